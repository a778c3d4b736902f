"""A user's own folder as a data set: images, scribbles and masks that share their stems."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import yaml

from ...scribbles.vocabulary import Vocabulary, load_vocabulary
from ...utils import paths
from ...utils.errors import BLPSegError, describe
from .splits import Split, register_split, splits, voc_colors

if TYPE_CHECKING:
    from detectron2.config import CfgNode

__all__ = ["register_folder"]

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
    if not folder.ROOT:
        raise BLPSegError("DATASETS.FOLDER.ROOT is empty; set it to the folder that holds images/, scribbles/, masks/")
    from detectron2.data import DatasetCatalog

    root = os.path.expanduser(folder.ROOT)
    classes, colors = _classes(folder, root)
    remedies = {
        part: f"DATASETS.FOLDER.{key} says where they lie below DATASETS.FOLDER.ROOT ({folder.ROOT})"
        for part, key in (("images", "*_IMAGES"), ("scribbles", "TRAIN_SCRIBBLES"), ("masks", "*_MASKS"))
    }
    volume = r"(?P<volume>.+)_slice_?(?P<slice>\d+)" if folder.EVALUATOR == "sem_seg_volume" else ""
    train = Split(
        name=f"{folder.NAME}_train",
        images=folder.TRAIN_IMAGES,
        scribbles=folder.TRAIN_SCRIBBLES,
        masks=folder.TRAIN_MASKS,
        root=root,
        remedies=remedies,
        volume=volume,
    )
    val = Split(
        name=f"{folder.NAME}_val",
        images=folder.VAL_IMAGES,
        masks=folder.VAL_MASKS,
        root=root,
        remedies=remedies,
        volume=volume,
    )
    for split in (train, val):
        if split.name not in _FOLDER_SPLITS and (split.name in splits() or split.name in DatasetCatalog):
            raise BLPSegError(
                f"DATASETS.FOLDER.NAME {folder.NAME!r}: {split.name} is another data set; choose a new name"
            )
    for split in (train, val):
        register_split(split, classes, colors, folder.IGNORE_LABEL, folder.EVALUATOR)
        _FOLDER_SPLITS.add(split.name)


def _classes(folder: CfgNode, root: str) -> tuple[list[str], list]:
    if bool(folder.CLASSES) == bool(folder.CLASSES_FILE):
        raise BLPSegError("DATASETS.FOLDER: give either CLASSES (a list of names) or CLASSES_FILE (a YAML file)")
    if folder.EVALUATOR not in ("sem_seg", "sem_seg_volume"):
        raise BLPSegError(f"DATASETS.FOLDER.EVALUATOR {folder.EVALUATOR!r}: expected 'sem_seg' or 'sem_seg_volume'")
    classes, colors, source = list(folder.CLASSES), None, "DATASETS.FOLDER.CLASSES"
    if folder.CLASSES_FILE:
        source = os.path.join(root, os.path.expanduser(folder.CLASSES_FILE))
        classes, colors = _read_classes_file(source)
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) != len(classes):
        raise BLPSegError(f"{source}: class names must be different strings, found {classes}")
    if len(classes) < 2 or len(classes) > 254:
        raise BLPSegError(f"{source}: 2 to 254 classes, background first, are possible; found {len(classes)}")
    return classes, colors or voc_colors(len(classes))


def _read_classes_file(path: str) -> tuple[list, list | None]:
    """Names and colours: `classes: [...]` with `colors: [[r, g, b], ...]`, or a vocabulary file of the converters."""
    if not paths.isfile(path):
        raise BLPSegError(f"{path}: no such file (DATASETS.FOLDER.CLASSES_FILE, relative to DATASETS.FOLDER.ROOT)")
    try:
        with paths.open_file(path) as file:
            content = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BLPSegError(f"{path}: not a YAML file ({describe(error)})") from error
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        return _from_vocabulary(load_vocabulary(path))
    colors = content.get("colors")
    if colors is not None and not (
        isinstance(colors, list) and len(colors) == len(content["classes"]) and all(map(_is_color, colors))
    ):
        raise BLPSegError(f"{path}: `colors` must be one [R, G, B] of 0..255 for each of the classes")
    return content["classes"], colors


def _from_vocabulary(vocabulary: Vocabulary) -> tuple[list[str], list | None]:
    names: dict[int, str] = {}
    for name, number in vocabulary.ids.items():
        names.setdefault(number, name)  # the first of several names for a class
    if sorted(names) != list(range(len(names))):
        raise BLPSegError(f"{vocabulary.source}: classes need the numbers 0, 1, ..., found {sorted(names)}")
    colors = {number: color for color, number in reversed(vocabulary.colors.items())}
    ordered = [colors.get(number) for number in range(len(names))]
    return [names[number] for number in range(len(names))], ordered if all(ordered) else None


def _is_color(color: object) -> bool:
    return isinstance(color, list) and len(color) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in color)
