"""ACDC, short-axis slices of cardiac MRI with scribbles drawn by experts; evaluated per volume in 3-D."""

from __future__ import annotations

from .splits import Split, register_split

CLASSES = ["background", "right ventricle", "myocardium", "left ventricle"]
COLORS = [(0, 0, 0), (66, 133, 244), (52, 168, 83), (234, 67, 53)]
VOLUME_PATTERN = r"(?P<volume>(?P<subject>patient\d+)_frame\d+)_slice_(?P<slice>\d+)"

_REMEDIES = dict.fromkeys(
    ("images", "scribbles", "masks"),
    "run `python datasets/prepare_acdc.py`, which converts the .h5 files (datasets/README.md, 'ACDC'), or set "
    "DETECTRON2_DATASETS to where acdc_png lies",
)

_COMMON = {"remedies": _REMEDIES, "volume": VOLUME_PATTERN}

for _split in (
    Split("acdc_scribble_train", *(f"acdc_png/{part}/train" for part in ("images", "scribbles", "masks")), **_COMMON),
    Split("acdc_val", "acdc_png/images/val", masks="acdc_png/masks/val", **_COMMON),
):
    register_split(_split, CLASSES, COLORS, evaluator_type="sem_seg_volume")
