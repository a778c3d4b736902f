#!/usr/bin/env python
"""Convert ACDC with expert scribbles (the .h5 files of WSL4MIS) to PNG, splits acdc_scribble_train and acdc_val."""

import argparse
import os

from blpseg.data.datasets import data_root
from blpseg.data.datasets.acdc import FOLDS, prepare
from blpseg.utils.cli import add_debug_flag, run_command
from blpseg.utils.parallel import default_workers

EXAMPLE = """
examples:
  python datasets/prepare_acdc.py
  python datasets/prepare_acdc.py --input /data/ACDC --output /data/acdc_png --fold 2
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source, output = os.path.join(data_root(), "ACDC"), os.path.join(data_root(), "acdc_png")
    parser.add_argument(
        "--input", default=source, help=f"holds ACDC_training_slices and / or ACDC_training_volumes (default: {source})"
    )
    parser.add_argument("--output", default=output, help=f"folder to write (default: {output})")
    parser.add_argument(
        "--fold",
        type=int,
        default=1,
        choices=range(1, FOLDS + 1),
        help="validation patients: 20 (fold - 1) + 1 .. 20 fold (default: 1)",
    )
    parser.add_argument("--jobs", type=int, default=default_workers(), help="processes (default: all cores)")
    add_debug_flag(parser)
    arguments = parser.parse_args()
    return prepare(arguments.input, arguments.output, arguments.fold, arguments.jobs)


if __name__ == "__main__":
    run_command(main)
