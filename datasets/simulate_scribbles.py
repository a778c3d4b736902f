#!/usr/bin/env python
"""Draw scribbles as a person might, from dense masks: every connected region gets a stroke, none leaves its region."""

import argparse

from blpseg.scribbles import simulate_folder
from blpseg.utils.cli import add_work_flags, count, fraction, run_command

EXAMPLES = """\
examples:
  %(prog)s --masks CamVid/trainannot --output CamVid/trainscribble --ignore-label 11
  %(prog)s --masks masks/ --output points/ --length 0            (ScribbleSup's protocol: 0, 0.3, 0.5, 0.8, 1)
  %(prog)s --masks masks/ --output biased/ --preference 1

Masks and scribbles are uint8 PNG; 255 = not annotated. A scribble depends on its mask, the mask's name and the options
alone. A second run makes only what is new or has changed. A file that cannot be read is named with the reason; the
others are still done, and the exit status is 1. docs/SCRIBBLES.md shows pictures.
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--masks", metavar="PATH", required=True, help="folder of dense masks, or one mask")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the scribbles, made where missing")
    parser.add_argument(
        "--preference",
        type=fraction,
        default=0.5,
        help="0 draws anywhere in a region, 1 only in its spacious middle (default: %(default)s)",
    )
    parser.add_argument(
        "--length",
        type=fraction,
        default=1.0,
        help="of a stroke relative to the whole one that its region gets; 0 is a dot. Shorter strokes are parts of "
        "longer ones (default: %(default)s)",
    )
    parser.add_argument("--width", type=count, default=3, help="of a stroke, in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same scribbles (default: %(default)s)")
    parser.add_argument(
        "--ignore-label",
        type=int,
        default=255,
        help="value of the masks that is no class; 11 for CamVid (default: %(default)s)",
    )
    add_work_flags(parser, force="draw again what is up to date, and replace files that were not drawn here")
    args = parser.parse_args()
    report = simulate_folder(
        args.masks,
        args.output,
        preference=args.preference,
        length=args.length,
        width=args.width,
        seed=args.seed,
        ignore_label=args.ignore_label,
        workers=args.workers,
        force=args.force,
    )
    return report.finish("scribbles", args.output)


if __name__ == "__main__":
    run_command(main)
