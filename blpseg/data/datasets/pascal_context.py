"""PASCAL-Context, 59 classes and background, with ScribbleSup's scribbles."""

from __future__ import annotations

from ...scribbles.vocabulary import CONTEXT_NAMES
from .splits import Split, register_split, voc_colors

__all__ = ["CLASSES", "MASKS"]

CLASSES = CONTEXT_NAMES  # as the scribble files spell them

_CONTEXT = "VOCdevkit/Context"
MASKS = f"{_CONTEXT}/SegmentationClass"  # the PNG files stand beside the .mat files they come from
_FETCH = (
    "set DETECTRON2_DATASETS to where the data lies; `python datasets/prepare_pascal_context.py` says what it "
    "expects there and where it comes from"
)
_REMEDIES = {
    "images": _FETCH,
    "names": _FETCH,
    "masks": "run `python datasets/prepare_pascal_context.py`, which converts the .mat files",
    "scribbles": "run `python datasets/prepare_scribbles.py --xml VOCdevkit/scribble_annotation/pascal_context "
    "--output VOCdevkit/scribble_annotation/pascal_context_label --vocabulary context` below the data root",
}

for _split in (
    Split(
        name="pascal_context_scribble_train",
        images=f"{_CONTEXT}/JPEGImages",
        scribbles="VOCdevkit/scribble_annotation/pascal_context_label",
        masks=MASKS,
        names=f"{_CONTEXT}/ImageSets/Segmentation/train.txt",
        remedies=_REMEDIES,
    ),
    Split(
        name="pascal_context_val",
        images=f"{_CONTEXT}/JPEGImages",
        masks=MASKS,
        names=f"{_CONTEXT}/ImageSets/Segmentation/val.txt",
        remedies=_REMEDIES,
    ),
):
    register_split(_split, CLASSES, voc_colors(len(CLASSES)))
