#!/usr/bin/env python
"""Check the tree of PASCAL VOC 2012 and write trainaug.txt, the 10,582 training names."""

import argparse
import os

from blpseg.data.datasets import data_root
from blpseg.data.datasets.pascal_voc import prepare
from blpseg.utils.cli import add_debug_flag, run_command

EXAMPLE = """
examples:
  python datasets/prepare_pascal_voc.py
  python datasets/prepare_pascal_voc.py --root /data/VOCdevkit/VOC2012
"""


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
