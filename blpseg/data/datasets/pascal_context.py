"""PASCAL-Context, 59 classes and background, with ScribbleSup's scribbles."""

from __future__ import annotations

from ...scribbles.vocabulary import CONTEXT_NAMES
from .splits import Split, register_split, voc_colors

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

_IMAGES, _LISTS = f"{_CONTEXT}/JPEGImages", f"{_CONTEXT}/ImageSets/Segmentation"
_SCRIBBLES = "VOCdevkit/scribble_annotation/pascal_context_label"
_TRAIN, _VAL = f"{_LISTS}/train.txt", f"{_LISTS}/val.txt"

for _split in (
    Split("pascal_context_scribble_train", _IMAGES, _SCRIBBLES, MASKS, _TRAIN, remedies=_REMEDIES),
    Split("pascal_context_val", _IMAGES, masks=MASKS, names=_VAL, remedies=_REMEDIES),
):
    register_split(_split, CLASSES, voc_colors(len(CLASSES)))
