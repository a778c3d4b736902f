#!/usr/bin/env python
"""Check the tree of PASCAL VOC 2012 and write trainaug.txt, the 10,582 training names."""

import argparse
import os
import sys

from blpseg.data.datasets.splits import read_names, require_folder
from blpseg.utils.cli import add_debug_flag, run_command
from blpseg.utils.errors import BLPSegError
from blpseg.utils.files import index_folder, write_bytes_atomic
from blpseg.utils.paths import data_root, open_file

TRAINAUG_COUNT = 10582  # METHOD.md section 8

EXAMPLE = """
examples:
  python datasets/prepare_pascal_voc.py
  python datasets/prepare_pascal_voc.py --root /data/VOCdevkit/VOC2012
"""


def prepare(root: str) -> int:
    """Check the tree of METHOD.md section 8 and write ``ImageSets/Segmentation/trainaug.txt``.

    The list holds every name in SegmentationClassAug that is not in val.txt, sorted.

    Args:
        root: the folder VOC2012.

    Returns:
        Exit status: 1 if a mask has no image or an image of val.txt no mask; each is named on stderr.

    Raises:
        BLPSegError: a folder or val.txt is missing.
    """
    help_text = "datasets/README.md, 'PASCAL VOC 2012', says where it comes from"
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        require_folder(os.path.join(root, folder), help_text)
    images = index_folder(os.path.join(root, "JPEGImages"))
    masks = index_folder(os.path.join(root, "SegmentationClassAug"))
    lists = os.path.join(root, "ImageSets", "Segmentation")
    val = read_names(os.path.join(lists, "val.txt"), help_text)

    problems = [f"{path}: no image {stem} in JPEGImages" for stem, path in masks.items() if stem not in images]
    problems += [f"{lists}/val.txt: {stem} has no mask in SegmentationClassAug" for stem in val if stem not in masks]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)

    names = sorted(set(masks) - set(val))
    if not names:
        raise BLPSegError(f"{root}/SegmentationClassAug: no mask beside those of val.txt; {help_text}")
    path = os.path.join(lists, "trainaug.txt")
    content = "".join(f"{name}\n" for name in names)
    current = None
    if os.path.isfile(path):
        with open_file(path) as file:
            current = file.read()
    if current != content:
        write_bytes_atomic(path, content.encode())
    print(f"{path}: {len(names)} names, {'up to date' if current == content else 'written'}")
    if len(names) != TRAINAUG_COUNT:
        print(
            f"warning: {TRAINAUG_COUNT} names make the usual training set, here are {len(names)}; "
            f"is SegmentationClassAug complete ({len(masks)} masks, usually 12031)?",
            file=sys.stderr,
        )
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.path.join(data_root(), "VOCdevkit", "VOC2012")
    parser.add_argument("--root", default=default, help=f"the folder VOC2012 (default: {default})")
    add_debug_flag(parser)
    return prepare(parser.parse_args().root)


if __name__ == "__main__":
    run_command(main)
