#!/usr/bin/env python
"""Convert PASCAL-Context's .mat files of 459 classes to PNG masks of 60, or take over PNG masks made elsewhere."""

import argparse
import os
import re
import struct
import sys
import zlib

import numpy as np

from blpseg.data.datasets.pascal_context import CLASSES
from blpseg.data.datasets.splits import read_names, require_folder
from blpseg.utils.cli import add_work_flags, run_command
from blpseg.utils.errors import BLPSegError, describe
from blpseg.utils.files import index_folder, read_bytes, read_label
from blpseg.utils.labels import IGNORED
from blpseg.utils.made import is_up_to_date, stamp, write_label
from blpseg.utils.parallel import process_files
from blpseg.utils.paths import data_root

# Spellings of 59_labels.txt that labels.txt has otherwise.
_ALIASES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
_FULL_NAMES = {"plane": "aeroplane", "bike": "bicycle", "plant": "pottedplant", "monitor": "tvmonitor"}
_NUMBERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"single", "double"}
_COMPRESSED = 15  # type of an element of a .mat file
_LARGEST_MAT = 1 << 27  # bytes
# How PNG masks made elsewhere number the classes: as here, or with the 59 names sorted (MMSegmentation's converter).
PNG_ORDERS = ("59_labels", "alphabetical")

EXAMPLE = """
examples:
  python datasets/prepare_pascal_context.py
  python datasets/prepare_pascal_context.py --png /data/VOC2010/SegmentationClassContext --png-order alphabetical
      masks from MMSegmentation's converter, whose classes are sorted by name
"""


def prepare(
    root: str, png: str = "", png_order: str = PNG_ORDERS[0], workers: int | None = None, force: bool = False
) -> int:
    """Make the 60-class masks ``SegmentationClass/NAME.png`` of PASCAL-Context.

    From ``SegmentationClass/NAME.mat`` (``LabelMap``, 459 classes of labels.txt, of which 59_labels.txt names those
    kept, in order; everything else becomes background), or from PNG masks of 60 classes. PNG files that are there
    without a .mat file are checked and left as they are. Those up to date are not made again.

    Args:
        root: the folder Context.
        png: folder of PNG masks to take instead of the .mat files; "" for none.
        png_order: of their classes, one of PNG_ORDERS.
        workers: processes.
        force: make masks again that are up to date, and replace PNG files that were not made here.

    Returns:
        Exit status: 1 if a file is bad or a listed one has no mask; each is named on stderr.

    Raises:
        BLPSegError: a folder or a list is missing, or 59_labels.txt names a class that labels.txt lacks.
    """
    help_text = "datasets/README.md, 'PASCAL-Context', says where it comes from"
    output = os.path.join(root, "SegmentationClass")
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        require_folder(os.path.join(root, folder), help_text)
    if png:
        require_folder(png, "--png names a folder of 60-class PNG masks")
        if os.path.realpath(png) == os.path.realpath(output):
            raise BLPSegError(f"{png}: --png must not be the output folder; PNG masks in it are used as they are")
        table = _alphabetical_table() if png_order == "alphabetical" else np.arange(len(CLASSES), dtype=np.uint8)
        table = np.append(table, np.full(256 - len(table), IGNORED, np.uint8))
        sources, others = index_folder(png), []
    else:
        sources = {n[:-4]: os.path.join(output, n) for n in sorted(os.listdir(output)) if n.endswith(".mat")}
        table = _label_table(output, help_text) if sources else np.zeros(0, np.uint8)
        others = [path for stem, path in index_folder(output).items() if stem not in sources]
    tasks = [(path, os.path.join(output, f"{stem}.png"), table, force) for stem, path in sources.items()]
    report = process_files(_convert, tasks, workers, "PASCAL-Context")
    checked = process_files(_check_png, others, workers, "PASCAL-Context PNG")
    report.up_to_date += checked.up_to_date
    report.failed += checked.failed

    masks = index_folder(output)
    for name in ("train", "val"):
        path = os.path.join(root, "ImageSets", "Segmentation", f"{name}.txt")
        missing = [stem for stem in read_names(path, help_text) if stem not in masks]
        if missing:
            report.fail(f"{path}: {len(missing)} names have no mask in {output}, first {missing[0]!r}")
    return report.finish("60-class masks", output)


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


def _convert(task: tuple[str, str, np.ndarray, bool]) -> bool:
    source, target, table, force = task
    made_from = stamp(table.tobytes(), read_bytes(source))
    if not force and is_up_to_date(target, made_from):
        return False
    labels = _read_mat(source, len(table)) if source.endswith(".mat") else _read_mask(source)
    write_label(target, table[labels], made_from, force=force)
    return True


def _check_mat(path: str) -> None:
    """That a .mat file is of version 5, and that what it compresses does not unpack to more than such a file holds."""
    data = read_bytes(path, _LARGEST_MAT)
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None or data[:6] != b"MATLAB":
        raise ValueError("not of version 5")
    place, unpacked = 128, 0
    while place + 8 <= len(data):
        kind, size = struct.unpack(f"{order}II", data[place : place + 8])
        if kind == _COMPRESSED:
            packed, stream = data[place + 8 : place + 8 + size], zlib.decompressobj()
            while packed and not stream.eof:
                unpacked += len(stream.decompress(packed, 1 << 20))
                packed = stream.unconsumed_tail
                if unpacked > _LARGEST_MAT:
                    raise ValueError(f"unpacks to more than {_LARGEST_MAT} bytes")
        place += 8 + size


def _read_mat(path: str, values: int) -> np.ndarray:
    """The (H, W) LabelMap of a .mat file, whole numbers 0..values - 1."""
    from scipy.io import loadmat, whosmat

    try:
        _check_mat(path)
        kinds = [kind for name, shape, kind in whosmat(path) if name == "LabelMap" and len(shape) == 2]
        if len(kinds) != 1 or kinds[0] not in _NUMBERS:  # a nested array can exhaust the parser's stack
            raise ValueError("LabelMap is no matrix of numbers")
        labels = np.asarray(loadmat(path, variable_names=["LabelMap"])["LabelMap"])
    except Exception as error:  # scipy lets through whatever its parsers meet in a damaged file
        raise BLPSegError(f"{path}: not a .mat file with LabelMap ({describe(error)}); fetch it again") from error
    if labels.ndim != 2 or labels.dtype.kind not in "uif" or labels.size == 0 or (labels != np.floor(labels)).any():
        raise BLPSegError(f"{path}: LabelMap must be (H, W) whole numbers, found {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= values:
        raise BLPSegError(f"{path}: LabelMap has {labels.min()}..{labels.max()}, labels.txt goes to {values - 1}")
    return labels.astype(np.intp)


def _check_png(path: str) -> bool:
    _read_mask(path)
    return False


def _read_mask(path: str) -> np.ndarray:
    labels = read_label(path)
    bad = labels[(labels >= len(CLASSES)) & (labels != IGNORED)]
    if bad.size:
        raise BLPSegError(f"{path}: value {bad.max()}; a mask of 60 classes holds 0..59, or 255 for ignored pixels")
    return labels


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.path.join(data_root(), "VOCdevkit", "Context")
    parser.add_argument("--root", default=default, help=f"the folder Context (default: {default})")
    parser.add_argument("--png", default="", metavar="DIR", help="PNG masks of 60 classes to take instead of .mat")
    parser.add_argument(
        "--png-order",
        choices=PNG_ORDERS,
        default=PNG_ORDERS[0],
        help="how --png numbers its classes: as 59_labels.txt, or by sorted name (default: 59_labels)",
    )
    add_work_flags(parser, force="make masks again that are up to date, and replace PNG files that were not made here")
    arguments = parser.parse_args()
    return prepare(arguments.root, arguments.png, arguments.png_order, arguments.workers, arguments.force)


if __name__ == "__main__":
    run_command(main)
