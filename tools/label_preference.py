#!/usr/bin/env python
"""Label preference, measured: how likely a pixel is to be annotated, by its distance to the boundary and thickness.

Writes label_preference.csv and label_preference.png. A curve that rises is the bias that BLPSeg is about: relative to
its class, the spacious middle is annotated more often than the boundary and thin parts. The dotted line is no bias.
"""

import argparse
import os

from blpseg.utils.cli import add_work_flags, count, fraction, run_command
from blpseg.utils.errors import BLPSegError

EXAMPLES = """\
examples:
  %(prog)s --dataset acdc_scribble_train --simulate 0 0.5 1 --output label_preference/
  %(prog)s --dataset camvid_val --simulate 0 1 --output out/        (no scribbles on disk: simulated ones alone)
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", metavar="NAME", required=True, help="a registered data set with dense masks")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the CSV and the figure")
    parser.add_argument(
        "--simulate",
        type=fraction,
        nargs="*",
        default=[],
        metavar="PREFERENCE",
        help="also measure scribbles simulated at these preferences, 0..1",
    )
    parser.add_argument("--width", type=count, default=1, help="of simulated strokes, in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of simulated strokes (default: %(default)s)")
    add_work_flags(parser)
    args = parser.parse_args()

    from detectron2.data import MetadataCatalog

    from blpseg.data.datasets import load_records
    from blpseg.scribbles import preference
    from blpseg.utils import paths

    records = [r for r in load_records(args.dataset, optional=("scribbles",)) if "sem_seg_file_name" in r]
    drawn = [r for r in records if "scribble_file_name" in r]
    if not drawn and not args.simulate:
        raise BLPSegError(f"{args.dataset} has no scribbles beside dense masks; measure simulated ones with --simulate")
    metadata = MetadataCatalog.get(args.dataset)
    counts = preference.measure(
        [(r.get("scribble_file_name"), r["sem_seg_file_name"]) for r in drawn or records],
        len(metadata.stuff_classes),
        ignore_label=metadata.ignore_label,
        preferences=args.simulate,
        width=args.width,
        seed=args.seed,
        workers=args.workers,
    )
    sets = ["on disk"] * bool(drawn) + [f"simulated, preference {value:g}" for value in args.simulate]

    paths.makedirs(args.output)
    table, figure = (os.path.join(args.output, f"label_preference.{kind}") for kind in ("csv", "png"))
    preference.write_csv(table, counts, metadata.stuff_classes, sets)
    preference.plot(figure, counts, metadata.stuff_classes, sets, f"{args.dataset}: {len(drawn or records)} images")
    print(preference.summary(counts, metadata.stuff_classes, sets))
    print(f"\nwrote {table} and {figure}")


if __name__ == "__main__":
    run_command(main)
