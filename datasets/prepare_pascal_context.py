#!/usr/bin/env python
"""Convert PASCAL-Context's .mat files of 459 classes to PNG masks of 60, or take over PNG masks made elsewhere."""

import argparse
import os

from blpseg.data.datasets import data_root
from blpseg.data.datasets.pascal_context import PNG_ORDERS, prepare
from blpseg.utils.cli import add_debug_flag, run_command
from blpseg.utils.parallel import default_workers

EXAMPLE = """
examples:
  python datasets/prepare_pascal_context.py
  python datasets/prepare_pascal_context.py --png /data/VOC2010/SegmentationClassContext --png-order alphabetical
      masks from MMSegmentation's converter, whose classes are sorted by name
"""


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
    parser.add_argument("--jobs", type=int, default=default_workers(), help="processes (default: all cores)")
    add_debug_flag(parser)
    arguments = parser.parse_args()
    return prepare(arguments.root, arguments.png, arguments.png_order, arguments.jobs)


if __name__ == "__main__":
    run_command(main)
