"""A user's own folder as a data set: images, scribbles and masks that share their stems."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ...utils.errors import BLPSegError
from ..project import folder_classes
from .splits import Split, register_split, splits

if TYPE_CHECKING:
    from detectron2.config import CfgNode

_FOLDER_SPLITS: set[str] = set()  # names this file entered; any other name in the catalog is somebody else's


def register_folder(cfg: CfgNode) -> None:
    """Enter ``<NAME>_train`` and ``<NAME>_val`` of ``DATASETS.FOLDER`` into the catalogs; nothing without a NAME.

    Calling it again replaces the two. Of the disk only CLASSES_FILE is read.

    Raises:
        BLPSegError: the name belongs to another data set, ROOT is not set, or the classes are missing, doubled,
            or given twice.
    """
    folder = cfg.DATASETS.FOLDER
    if not folder.NAME:
        return
    if not re.fullmatch(r"[\w-][\w.-]*", folder.NAME):
        raise BLPSegError(
            f"DATASETS.FOLDER.NAME {folder.NAME!r}: results are written into folders of that name; use letters, "
            "digits, '_', '-' and '.'"
        )
    if not folder.ROOT:
        raise BLPSegError("DATASETS.FOLDER.ROOT is empty; set it to the folder that holds images/, scribbles/, masks/")
    from detectron2.data import DatasetCatalog

    root = os.path.expanduser(folder.ROOT)
    classes, colors = folder_classes(folder)
    remedies = {
        part: f"DATASETS.FOLDER.{key} says where they lie below DATASETS.FOLDER.ROOT ({folder.ROOT})"
        for part, key in (("images", "*_IMAGES"), ("scribbles", "*_SCRIBBLES"), ("masks", "*_MASKS"))
    }
    volume = r"(?P<volume>.+)_slice_?(?P<slice>\d+)" if folder.EVALUATOR == "sem_seg_volume" else ""
    common = {"root": root, "remedies": remedies, "volume": volume}
    parts = {"scribbles": folder.TRAIN_SCRIBBLES, "masks": folder.TRAIN_MASKS}
    skip = folder.SKIP_UNANNOTATED
    train = Split(f"{folder.NAME}_train", folder.TRAIN_IMAGES, **parts, **common, skip_unannotated=skip)
    parts = {"scribbles": folder.VAL_SCRIBBLES, "masks": folder.VAL_MASKS}
    val = Split(f"{folder.NAME}_val", folder.VAL_IMAGES, **parts, **common, skip_unannotated=True, evaluated=True)
    for split in (train, val):
        if split.name not in _FOLDER_SPLITS and (split.name in splits() or split.name in DatasetCatalog):
            raise BLPSegError(
                f"DATASETS.FOLDER.NAME {folder.NAME!r}: {split.name} is another data set; choose a new name"
            )
    for split in (train, val):
        register_split(split, classes, colors, folder.IGNORE_LABEL, folder.EVALUATOR)
        _FOLDER_SPLITS.add(split.name)
