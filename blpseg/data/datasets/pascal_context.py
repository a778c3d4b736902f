"""PASCAL-Context, 59 classes and background, with ScribbleSup's scribbles."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import numpy as np

from ...scribbles.vocabulary import CONTEXT_NAMES
from ...utils.errors import BLPSegError, describe
from ...utils.files import read_label, write_png_atomic
from ...utils.parallel import FileReport, is_up_to_date, process_files
from .splits import Split, index_folder, read_names, register_split, require_folder, voc_colors

__all__ = ["CLASSES", "MASKS", "PNG_ORDERS", "prepare"]

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

# Spellings of 59_labels.txt that labels.txt has otherwise.
_ALIASES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
_FULL_NAMES = {"plane": "aeroplane", "bike": "bicycle", "plant": "pottedplant", "monitor": "tvmonitor"}
# How PNG masks made elsewhere number the classes: as here, or with the 59 names sorted (MMSegmentation's converter).
PNG_ORDERS = ("59_labels", "alphabetical")


def prepare(root: str, png: str = "", png_order: str = PNG_ORDERS[0], jobs: int = 1) -> int:
    """Make the 60-class masks ``SegmentationClass/NAME.png`` of PASCAL-Context.

    From ``SegmentationClass/NAME.mat`` (``LabelMap``, 459 classes of labels.txt, of which 59_labels.txt names those
    kept, in order; everything else becomes background), or from PNG masks of 60 classes. PNG files that are there
    without a .mat file are checked and left as they are. Files newer than their source are not made again.

    Args:
        root: the folder Context.
        png: folder of PNG masks to take instead of the .mat files; "" for none.
        png_order: of their classes, one of PNG_ORDERS.
        jobs: processes.

    Returns:
        Exit status: 1 if a file is bad or a listed one has no mask; each is named on stderr.

    Raises:
        BLPSegError: a folder or a list is missing, or 59_labels.txt names a class that labels.txt lacks.
    """
    help_text = "datasets/README.md, 'PASCAL-Context', tells where it comes from"
    output = os.path.join(root, "SegmentationClass")
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        require_folder(os.path.join(root, folder), help_text)
    if png:
        require_folder(png, "--png names a folder of 60-class PNG masks")
        if os.path.realpath(png) == os.path.realpath(output):
            raise BLPSegError(f"{png}: --png must not be the output folder; PNG masks in it are used as they are")
        table = _alphabetical_table() if png_order == "alphabetical" else np.arange(len(CLASSES), dtype=np.uint8)
        tasks = [(path, os.path.join(output, f"{stem}.png"), table) for stem, path in index_folder(png).items()]
        report = process_files(_convert_png, tasks, jobs, "PASCAL-Context PNG")
    else:
        stems = sorted(n[:-4] for n in os.listdir(output) if n.endswith(".mat") and not n.startswith("."))
        report = FileReport()
        if stems:
            table = _label_table(output, help_text)
            tasks = [(os.path.join(output, f"{s}.mat"), os.path.join(output, f"{s}.png"), table) for s in stems]
            report = process_files(_convert_mat, tasks, jobs, "PASCAL-Context .mat")
        others = [path for stem, path in index_folder(output).items() if stem not in set(stems)]
        checked = process_files(_check_png, others, jobs, "PASCAL-Context PNG")
        report.kept += checked.kept
        report.failures += checked.failures

    masks = index_folder(output)
    for name in ("train", "val"):
        path = os.path.join(root, "ImageSets", "Segmentation", f"{name}.txt")
        missing = [stem for stem in read_names(path, help_text) if stem not in masks]
        if missing:
            report.failures.append(f"{path}: {len(missing)} names have no mask in {output}, first {missing[0]!r}")
            print(f"error: {report.failures[-1]}", file=sys.stderr)
    return report.finish(f"{output}: 60-class masks")


def _read_label_list(path: str, help_text: str) -> dict[str, int]:
    """Name -> number of a list with lines "12: name"; blanks in names do not count."""
    text = " ".join(read_names(path, help_text))
    entries = re.findall(r"(\d+)\s*:\s*(.+?)(?=\s+\d+\s*:|$)", text)
    if not entries:
        raise BLPSegError(f"{path}: expected lines such as '12: name'; {help_text}")
    return {name.replace(" ", ""): int(number) for number, name in entries}


def _label_table(folder: str, help_text: str) -> np.ndarray:
    """Class 0..59 of each label 0..459."""
    labels = _read_label_list(os.path.join(folder, "labels.txt"), help_text)
    kept_path = os.path.join(folder, "59_labels.txt")
    kept = list(_read_label_list(kept_path, help_text))
    expected = len(CLASSES) - 1
    if len(kept) > expected:
        raise BLPSegError(f"{kept_path}: {expected} names expected, found {len(kept)}; {help_text}")
    if len(kept) < expected:
        print(f"warning: {kept_path}: {expected} names expected, found {len(kept)}", file=sys.stderr)
    table = np.zeros(max(labels.values()) + 1, np.uint8)
    for number, name in enumerate(kept, 1):
        label = labels.get(name, labels.get(_ALIASES.get(name, "")))
        if label is None:
            raise BLPSegError(f"{kept_path}: {name!r} is not in labels.txt; are the two of one release?")
        table[label] = number
    return table


def _alphabetical_table() -> np.ndarray:
    names = [_FULL_NAMES.get(name, name) for name in CLASSES[1:]]
    return np.array([0] + [names.index(name) + 1 for name in sorted(names)], np.uint8)


def _convert_mat(task: tuple[str, str, np.ndarray]) -> bool:
    source, target, table = task
    if is_up_to_date(target, source, *_lists(os.path.dirname(source))):
        return False
    from scipy.io import loadmat

    try:
        labels = np.asarray(loadmat(source, variable_names=["LabelMap"])["LabelMap"])
    except Exception as error:  # scipy lets through whatever its parsers meet in a damaged file
        raise BLPSegError(f"{source}: not a .mat file with LabelMap ({describe(error)}); fetch it again") from error
    if labels.ndim != 2 or labels.dtype.kind not in "uif" or labels.size == 0 or (labels != np.floor(labels)).any():
        raise BLPSegError(f"{source}: LabelMap must be (H, W) whole numbers, found {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= len(table):
        raise BLPSegError(f"{source}: LabelMap has {labels.min()}..{labels.max()}, labels.txt goes to {len(table) - 1}")
    write_png_atomic(target, table[labels.astype(np.intp)])
    return True


def _lists(folder: str) -> Sequence[str]:
    return [os.path.join(folder, name) for name in ("labels.txt", "59_labels.txt")]


def _convert_png(task: tuple[str, str, np.ndarray]) -> bool:
    source, target, table = task
    if is_up_to_date(target, source):
        return False
    labels = _read_mask(source)
    table = np.concatenate([table, np.full(256 - len(table), 255, np.uint8)])
    write_png_atomic(target, table[labels])
    return True


def _check_png(path: str) -> bool:
    _read_mask(path)
    return False


def _read_mask(path: str) -> np.ndarray:
    labels = read_label(path)
    bad = labels[(labels >= len(CLASSES)) & (labels != 255)]
    if bad.size:
        raise BLPSegError(f"{path}: value {bad.max()}; a mask of 60 classes holds 0..59, or 255 for ignored pixels")
    return labels
