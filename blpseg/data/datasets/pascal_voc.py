"""PASCAL VOC 2012 with the augmented masks (SBD) and ScribbleSup's scribbles."""

from __future__ import annotations

from ...scribbles.vocabulary import VOC_NAMES
from .splits import Split, register_split, voc_colors

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

_IMAGES, _MASKS, _LISTS = f"{_VOC}/JPEGImages", f"{_VOC}/SegmentationClassAug", f"{_VOC}/ImageSets/Segmentation"
_SCRIBBLES = "VOCdevkit/scribble_annotation/pascal_2012_label"
_TRAIN, _VAL = f"{_LISTS}/trainaug.txt", f"{_LISTS}/val.txt"

for _split in (
    Split("voc_2012_scribble_trainaug", _IMAGES, _SCRIBBLES, _MASKS, _TRAIN, remedies=_REMEDIES),
    Split("voc_2012_val", _IMAGES, masks=_MASKS, names=_VAL, remedies=_REMEDIES | {"names": _FETCH}),
):
    register_split(_split, CLASSES, voc_colors(len(CLASSES)))
