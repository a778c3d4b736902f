#!/usr/bin/env python
"""Make labels of classes 0 to 18 of the label ids in Cityscapes' masks and in s4Cityscapes' scribbles."""

import argparse
import os

import numpy as np

from blpseg.data.datasets.splits import require_folder
from blpseg.utils.cli import add_work_flags, run_command
from blpseg.utils.files import index_folder, read_bytes, read_label
from blpseg.utils.labels import UNANNOTATED
from blpseg.utils.made import is_up_to_date, stamp, write_label
from blpseg.utils.parallel import process_files
from blpseg.utils.paths import data_root

# Source and output below the data root.
_FOLDERS = (
    ("s4Cityscapes/scribbles/gtFine/train", "s4Cityscapes/labels/train"),
    ("cityscapes/gtFine/train", "s4Cityscapes/masks/train"),
    ("cityscapes/gtFine/val", "s4Cityscapes/masks/val"),
)
_SUFFIX = "_gtFine_labelIds"

EXAMPLE = """
examples:
  python datasets/prepare_cityscapes.py
  python datasets/prepare_cityscapes.py --root /data
"""


def prepare(root: str, workers: int | None = None, force: bool = False) -> int:
    """Make ``s4Cityscapes/labels/`` and ``s4Cityscapes/masks/`` of the files ``CITY/*_gtFine_labelIds.png``.

    The 19 classes that Cityscapes evaluates become 0..18, in the order of its train ids; every other label id becomes
    255. In the scribbles that is id 0, "not annotated". Those up to date are not made again.

    Args:
        root: the data root, which holds cityscapes/ and s4Cityscapes/.
        workers: processes.
        force: make labels again that are up to date, and replace those that were not made here.

    Returns:
        Exit status: 1 if a file is bad; each is named on stderr.

    Raises:
        BLPSegError: a folder is missing.
    """
    table = _classes_of_ids()
    tasks = []
    for source, target in _FOLDERS:
        folder, output = os.path.join(root, source), os.path.join(root, target)
        require_folder(folder, "datasets/README.md, 'Scribbles for All', says where it comes from")
        files = index_folder(folder, _SUFFIX)
        print(f"{folder}: {len(files)} files *{_SUFFIX}.png")
        tasks += [(path, os.path.join(output, f"{stem}.png"), table, force) for stem, path in files.items()]
    return process_files(_convert, tasks, workers, "Cityscapes").finish("labels", os.path.join(root, "s4Cityscapes"))


def _classes_of_ids() -> np.ndarray:
    """(256,) uint8: the class of each label id."""
    from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

    table = np.full(256, UNANNOTATED, np.uint8)
    for category in CITYSCAPES_CATEGORIES:
        table[category["id"]] = category["trainId"]
    return table


def _convert(task: tuple[str, str, np.ndarray, bool]) -> bool:
    source, target, table, force = task
    made_from = stamp(table.tobytes(), read_bytes(source))
    if not force and is_up_to_date(target, made_from):
        return False
    write_label(target, table[read_label(source)], made_from, force=force)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = data_root()
    parser.add_argument("--root", default=default, help=f"holds cityscapes/ and s4Cityscapes/ (default: {default})")
    add_work_flags(parser, force="make labels again that are up to date, and replace those that were not made here")
    arguments = parser.parse_args()
    return prepare(arguments.root, arguments.workers, arguments.force)


if __name__ == "__main__":
    run_command(main)
