#!/usr/bin/env python
"""Time and memory of BLPSeg's parts, each beside the plain way to do the same, held to its target."""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # research/ is not installed

from blpseg.utils.cli import add_debug_flag, count, run_command

PARTS = {
    "lam": "local aggregation: exact and windowed against the dense tables, errors, scaling",
    "train": "a training step against the formulas taken literally",
    "inference": "8-view inference of an image against a plain loop with the dense tables",
    "data": "the training mapper against decoding a JPEG and one resize",
    "scribbles": "stroke files to labels against minidom and a pixel loop",
    "evaluator": "confusion accumulation against the tiny model's forward",
    "optimizer": "a step of AdamW as we build it against torch's default form",
    "all": "all of these",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
Both sides of a pair take turns in one process and the least time of each counts; the memory of each is the peak of a
fresh process beyond what it holds when the model and the inputs are there. Quit other work first: ratios suffer less
from it than seconds do, but they suffer. docs/PERFORMANCE.md says what limits each figure.

parts:
"""
        + "\n".join(f"  {name:10} {what}" for name, what in PARTS.items())
        + """

examples:
  tools/benchmark.py all --output output/benchmark.json
  tools/benchmark.py lam --grid 128 128 --repeat 5
  tools/benchmark.py lam train inference --device cuda --amp --batch 5 --train-batch 5
""",
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--repeat", type=count, metavar="N", help="rounds of each pair (default: 3)")
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: as torch has it)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--amp", action="store_true", help="mixed precision, as the published models train")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: try the benchmark itself")
    lam = parser.add_argument_group("lam")
    lam.add_argument("--grid", nargs=2, type=count, metavar=("H", "W"), help="logits' grid (default: 96 96)")
    lam.add_argument("--channels", type=count, metavar="D", help="of the features (default: 256)")
    lam.add_argument("--classes", type=count, metavar="C", help="default: 21")
    lam.add_argument("--batch", type=count, metavar="N", help="images (default: 1)")
    lam.add_argument("--grids", nargs="+", type=count, metavar="SIDE", help="of scaling (default: 48 96 192 384)")
    lam.add_argument("--max-seconds", type=float, metavar="S", help="leave slower scaling figures out (default: 60)")
    model = parser.add_argument_group("train and inference")
    model.add_argument("--train-config", metavar="FILE", help="default: configs/PascalVOC-Scribble/blpseg_R101.yaml")
    model.add_argument("--crop", type=count, metavar="PIXELS", help="side of a training crop (default: 384)")
    model.add_argument("--train-batch", type=count, metavar="N", help="crops a step (default: 2)")
    return add_debug_flag(parser).parse_args()


def main() -> None:
    args = parse_arguments()

    import torch
    from tqdm import tqdm

    from blpseg.utils.errors import BLPSegError
    from blpseg.utils.files import check_writable, write_json
    from research.benchmark import BENCHMARKS, Options, table
    from research.benchmark.measure import environment

    if args.device == "cuda" and not torch.cuda.is_available():
        raise BLPSegError("--device cuda: there is no CUDA device here; leave the option out for the CPU")
    if args.amp and args.device == "cpu":
        raise BLPSegError("--amp: mixed precision is for --device cuda")
    if args.threads:
        torch.set_num_threads(args.threads)
    options = Options(device=args.device, amp=args.amp)
    options = options.smoke() if args.smoke else options
    given = {key: value for key, value in vars(args).items() if value is not None and key in vars(options)}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    options = Options(**{**vars(options), **given})

    rows = []
    result = {"environment": environment(args.device), "options": vars(options)}

    def write() -> None:
        if args.output:
            content = {**result, "rows": [row.as_dict() for row in rows]}
            write_json(args.output, content)

    if args.output:
        check_writable(args.output)
    parts = list(BENCHMARKS) if "all" in args.parts else dict.fromkeys(args.parts)
    with tqdm(parts, disable=not sys.stderr.isatty()) as bar:
        for part in bar:
            bar.set_description(part)
            for row in BENCHMARKS[part](options):
                if args.smoke and not row.quantity.startswith(("error", "labels")):  # sizes at which these mean nothing
                    row = dataclasses.replace(row, target=None)
                rows.append(row)
                bar.set_postfix_str(f"{row.case} {row.quantity}"[:60])
                write()  # after each row, so that an interruption loses none before it
    print(table(rows))


if __name__ == "__main__":
    run_command(main)
