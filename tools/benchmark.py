#!/usr/bin/env python
"""Time and memory of BLPSeg's parts, each beside the plain way to do the same, held to its target."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # research/ is not installed

from blpseg.utils.cli import add_debug_flag, count, run_command

EPILOG = """
parts:
  lam        local aggregation: exact and windowed against the dense tables, error, scaling
  train      a training step against the formulas taken literally
  losses     a step of blpseg_lite with each further loss against one without
  inference  8-view inference of an image against a plain loop with the dense tables
  data       the training mapper against decoding a JPEG and one resize
  scribbles  stroke files to labels against minidom and a pixel loop
  all        all of these

Both sides of a pair take turns in one process and the least time of each counts; the memory of each is the peak of a
fresh process beyond what it holds when the model and the inputs are there (Linux). Quit other work first: ratios suffer
less from it than seconds do, but they suffer. docs/PERFORMANCE.md says what limits each figure.

examples:
  tools/benchmark.py all --output output/benchmark.csv
  tools/benchmark.py lam --grid 128 128 --repeat 5
  tools/benchmark.py lam train inference --device cuda --amp --batch 5 --train-batch 5
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("lam", "train", "losses", "inference", "data", "scribbles", "all")

    def add(flag, default, what, metavar, **more):
        parser.add_argument(flag, default=default, metavar=metavar, help=f"{what} (default: %(default)s)", **more)

    parser.add_argument("parts", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--output", metavar="FILE", help="write the figures as CSV")
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--amp", action="store_true", help="mixed precision, as the published models train")
    add("--repeat", 3, "rounds of each pair", "N", type=count)
    add("--grid", [96, 96], "lam: grid of the logits", ("H", "W"), type=count, nargs=2)
    add("--channels", 256, "lam: of the features", "D", type=count)
    add("--classes", 21, "lam: of the logits", "C", type=count)
    add("--batch", 1, "lam: images", "N", type=count)
    add("--grids", [48, 96, 192], "lam: sides of the grids of scaling", "SIDE", type=count, nargs="*")
    voc = "configs/PascalVOC-Scribble/blpseg_R101.yaml"
    add("--train-config", voc, "train, inference and data: config of the model", "FILE")
    add("--crop", 384, "train: side of a crop, pixels", "SIDE", type=count)
    add("--train-batch", 2, "train: crops of a step", "N", type=count)
    add("--image-size", [375, 500], "inference and data: size of an image", ("H", "W"), type=count, nargs=2)
    add("--images", 40, "data: how many", "N", type=count)
    add("--stroke-files", 2000, "scribbles: how many", "N", type=count)
    args = add_debug_flag(parser).parse_args()

    import torch
    from tabulate import tabulate

    from blpseg.utils.device import choose_device
    from blpseg.utils.errors import BLPSegError
    from blpseg.utils.files import check_writable
    from research.benchmark.measure import environment
    from research.benchmark.workloads import BENCHMARKS
    from research.study import write_rows

    if args.device == "cuda" and not torch.cuda.is_available():
        raise BLPSegError("--device cuda: there is no CUDA device here; leave the option out for the CPU")
    if args.amp and args.device == "cpu":
        raise BLPSegError("--amp: mixed precision is for --device cuda")
    if args.output:
        check_writable(args.output)
    choose_device(args.device)  # sets up the CPU as training does
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, around = [], environment(args.device)
    for part in BENCHMARKS if "all" in args.parts else dict.fromkeys(args.parts):
        for row in BENCHMARKS[part](args):
            rows.append(row)
            if args.output:  # after each row, so that an interruption loses none before it
                write_rows(args.output, [{**row, **around} for row in rows])
    cells = [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    print(tabulate(cells, headers=list(rows[0]), disable_numparse=True))


if __name__ == "__main__":
    run_command(main)
