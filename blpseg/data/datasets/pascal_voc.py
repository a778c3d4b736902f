"""PASCAL VOC 2012 with the augmented masks (SBD) and ScribbleSup's scribbles."""

from __future__ import annotations

from ...scribbles.vocabulary import VOC_NAMES
from .splits import Split, register_split, voc_colors

__all__ = ["CLASSES"]

CLASSES = VOC_NAMES  # as the scribble files spell them

_VOC = "VOCdevkit/VOC2012"
_FETCH = (
    "set DETECTRON2_DATASETS to where the data lies; `python datasets/prepare_pascal_voc.py` says what it "
    "expects there and where it comes from"
)
_CHECK = "run `python datasets/prepare_pascal_voc.py`, which checks the tree and writes trainaug.txt"
_REMEDIES = {
    "images": _FETCH,
    "masks": _FETCH,
    "names": _CHECK,
    "scribbles": "run `python datasets/prepare_scribbles.py --xml VOCdevkit/scribble_annotation/pascal_2012 --output "
    "VOCdevkit/scribble_annotation/pascal_2012_label --vocabulary voc` below the data root",
}

for _split in (
    Split(
        name="voc_2012_scribble_trainaug",
        images=f"{_VOC}/JPEGImages",
        scribbles="VOCdevkit/scribble_annotation/pascal_2012_label",
        masks=f"{_VOC}/SegmentationClassAug",
        names=f"{_VOC}/ImageSets/Segmentation/trainaug.txt",
        remedies=_REMEDIES,
    ),
    Split(
        name="voc_2012_val",
        images=f"{_VOC}/JPEGImages",
        masks=f"{_VOC}/SegmentationClassAug",
        names=f"{_VOC}/ImageSets/Segmentation/val.txt",
        remedies=_REMEDIES | {"names": _FETCH},
    ),
):
    register_split(_split, CLASSES, voc_colors(len(CLASSES)))
