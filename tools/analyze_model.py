#!/usr/bin/env python
"""Parameters, operations, memory and time of a model, part by part, and the share of local aggregation."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # research/ is not installed

from blpseg.utils.cli import add_debug_flag, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
One image, one forward with gradient; no weights are loaded. Operations are multiply-adds as fvcore counts them;
those of local aggregation are the dense formula's. `kept` is what waits for the gradient, `peak` what the forward
takes at its peak.

example:
  tools/analyze_model.py --config-file configs/PascalVOC-Scribble/blpseg_R101.yaml --size 384 384 \\
      --opts MODEL.DEVICE cpu
""",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config of the model")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), default=[384, 384], help="default: 384 384")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config keys")
    return add_debug_flag(parser).parse_args()


def main() -> None:
    args = parse_arguments()

    import torch
    from detectron2.modeling import build_model
    from tabulate import tabulate

    from blpseg import get_cfg
    from blpseg.modeling import BLPSeg
    from blpseg.utils.errors import BLPSegError
    from research.benchmark.analysis import analyze

    if min(args.size) < 32:
        raise BLPSegError(f"--size {args.size[0]} {args.size[1]}: sides of at least 32 pixels are needed")
    cfg = get_cfg(args.config_file, args.opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    if not isinstance(model, BLPSeg):
        raise BLPSegError(
            f"{args.config_file}: MODEL.META_ARCHITECTURE is {type(model).__name__}; only BLPSeg is analysed"
        )
    parts = analyze(model, *args.size)
    if args.json:
        print(json.dumps([vars(part) for part in parts], indent=1))
        return

    columns = ["parameters", "operations", "kept", "peak", "seconds"]
    total = {column: sum(getattr(part, column) or 0 for part in parts) for column in columns}
    units = {"parameters": 1e6, "operations": 1e9, "kept": 2**20, "peak": 2**20, "seconds": 1}

    def cells(values: dict) -> list[str]:
        return ["" if values[column] is None else f"{values[column] / units[column]:.2f}" for column in columns]

    rows = [
        [part.name, *cells(vars(part)), f"{100 * (part.operations or 0) / total['operations']:.1f}",
         f"{100 * part.kept / total['kept']:.1f}", f"{100 * part.seconds / total['seconds']:.1f}"]
        for part in parts
    ]  # fmt: skip
    # Peaks do not add up: the parts run one after the other.
    rows.append(["sum", *cells({**total, "peak": None}), "100", "100", "100"])
    headers = ["part", "parameters M", "operations G", "kept MiB", "peak MiB", "seconds", "% op.", "% kept", "% time"]
    print(tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))


if __name__ == "__main__":
    run_command(main)
