#!/usr/bin/env python
"""Make the generated data set, splits synthetic_scribble_train and synthetic_val."""

import argparse
import os

from blpseg.data.datasets import data_root
from blpseg.data.datasets.synthetic import FOLDER
from blpseg.data.scenes import make_synthetic
from blpseg.utils.cli import add_debug_flag, run_command
from blpseg.utils.parallel import default_workers

EXAMPLE = """
examples:
  python datasets/make_synthetic.py
  python datasets/make_synthetic.py --size 96 160 --train 1000 --preference 1
  python datasets/make_synthetic.py --shuffle-scribbles --output /tmp/control/synthetic
      then train with DETECTRON2_DATASETS=/tmp/control: what remains of the score is not learned from scribbles
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.path.join(data_root(), FOLDER)
    parser.add_argument("--output", default=default, help=f"folder to write (default: {default})")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[128], help="side, or height and width, in pixels (default: 128)"
    )
    parser.add_argument("--train", type=int, default=400, help="training images (default: 400)")
    parser.add_argument("--val", type=int, default=100, help="validation images (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data set (default: 0)")
    parser.add_argument(
        "--own-hue",
        type=float,
        default=0.7,
        help="share of objects in the hue of their kind: the more, the easier to tell apart (default: 0.7)",
    )
    parser.add_argument(
        "--colour-overlap",
        type=float,
        default=1.0,
        help="1: kinds and ground share colours, 0: hue and saturation tell most of them apart (default: 1)",
    )
    parser.add_argument(
        "--preference",
        type=float,
        default=0.5,
        help="0 scribbles anywhere in a region, 1 only in its spacious middle (default: 0.5)",
    )
    parser.add_argument("--length", type=float, default=1.0, help="of a stroke, 0..1 of the whole one (default: 1)")
    parser.add_argument("--width", type=int, default=3, help="of a stroke, in pixels (default: 3)")
    parser.add_argument("--shuffle-scribbles", action="store_true", help="permute the scribbles among the images")
    parser.add_argument("--jobs", type=int, default=default_workers(), help="processes (default: all cores)")
    add_debug_flag(parser)
    arguments = parser.parse_args()
    if len(arguments.size) > 2:
        parser.error("--size takes one or two numbers")

    made = make_synthetic(
        arguments.output,
        size=(arguments.size * 2)[:2],
        train=arguments.train,
        val=arguments.val,
        seed=arguments.seed,
        own_hue=arguments.own_hue,
        colour_overlap=arguments.colour_overlap,
        preference=arguments.preference,
        length=arguments.length,
        scribble_width=arguments.width,
        shuffle_scribbles=arguments.shuffle_scribbles,
        jobs=arguments.jobs,
    )
    state = "made" if made else "up to date"
    print(f"{arguments.output}: {arguments.train} training and {arguments.val} validation images, {state}")


if __name__ == "__main__":
    run_command(main)
