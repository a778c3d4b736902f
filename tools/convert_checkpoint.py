#!/usr/bin/env python3
"""Convert weights, recognised by content: published BLPSeg checkpoints and ResNets to ours, ours to the published.

    tools/convert_checkpoint.py published.pth blpseg_voc.pth      # then MODEL.WEIGHTS blpseg_voc.pth
    tools/convert_checkpoint.py resnet101s.pth R101_deep_stem.pth
    tools/convert_checkpoint.py resnet50-torchvision.pth R50.pth
    tools/convert_checkpoint.py output/model_final.pth published_layout.pth

Nothing in the files is executed.
"""

import argparse
import os

from blpseg.utils.cli import add_debug_flag, run_command
from blpseg.utils.errors import BLPSegError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN", help="weights to read: .pth, or a .pkl of NumPy arrays")
    parser.add_argument("output", metavar="OUT", help="file to write, ending in .pth")
    parser.add_argument(
        "--unannotated-weight", type=float, default=0.02, metavar="W",
        help="last value of CELoss.weight in the published layout (default 0.02)",
    )  # fmt: skip
    add_debug_flag(parser)
    args = parser.parse_args()
    if not args.output.endswith(".pth"):
        raise BLPSegError(f"{args.output}: the converted file's name must end in .pth")
    if os.path.realpath(args.input) == os.path.realpath(args.output):
        raise BLPSegError(f"{args.output}: is the input; give another name so that the original stays")

    from blpseg.checkpoint import load_file, provenance, save_atomic, state_dict_of
    from blpseg.checkpoint.conversion import convert

    state = state_dict_of(load_file(args.input), args.input)
    result = convert(state, args.input, args.unannotated_weight)
    to_published = "CELoss.weight" in result.state_dict
    content = result.state_dict if to_published else {"model": result.state_dict, "provenance": provenance()}
    save_atomic(args.output, content)

    print(f"{args.input}: {result.source}")
    print(f"matched {len(state) - len(result.dropped)} of {len(state)} tensors")
    for key, reason in result.dropped:
        print(f"dropped {key} {tuple(state[key].shape)}: {reason}")
    print(f"stays at its initial value: {', '.join(result.initial) or 'nothing'}")
    if result.config:
        print(f"fits a config with {' '.join(result.config)}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
