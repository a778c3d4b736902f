#!/usr/bin/env python3
"""Train and evaluate a model: one way for one process, several GPUs, several machines."""

import argparse
import signal

# Until the run has set up its own handling, Ctrl-C ends this process without a traceback of the imports below.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from blpseg.utils.cli import add_debug_flag, run_command  # noqa: E402

EXAMPLES = """
examples:
  train, evaluating at the end (results and checkpoints in OUTPUT_DIR):
    tools/train_net.py --config-file configs/Synthetic-Scribble/blpseg_tiny.yaml OUTPUT_DIR output/tiny
  go on after an interruption of any kind:
    tools/train_net.py --config-file configs/Synthetic-Scribble/blpseg_tiny.yaml --resume OUTPUT_DIR output/tiny
  evaluate:
    tools/train_net.py --config-file C --eval-only MODEL.WEIGHTS output/tiny/model_final.pth
  two machines of 8 GPUs:
    tools/train_net.py --config-file C --num-gpus 8 --num-machines 2 --machine-rank {0,1} --dist-url tcp://HOST0:29500
  torchrun starts the processes instead:
    torchrun --nproc-per-node 8 tools/train_net.py --config-file C

exit status: 0 done; 1 an error, told in one line; 130 or 143 stopped by Ctrl-C or SIGTERM with the state saved.
docs/TRAINING.md tells more.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--config-file", default="", metavar="FILE", help="YAML config (default: none)")
    p.add_argument("--resume", action="store_true", help="continue from the newest readable checkpoint in OUTPUT_DIR")
    p.add_argument("--overwrite", action="store_true", help="delete the checkpoints and metrics that OUTPUT_DIR holds")
    p.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST, no training")
    p.add_argument("--replay", default="", metavar="DUMP", help="repeat the step of a dump_*.pth that NaN left")
    p.add_argument(
        "--trust-checkpoint", action="store_true", help="read weights with plain pickle, which can run code they carry"
    )
    p.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine: one a GPU, or on the CPU (default 1)",
    )
    p.add_argument("--num-machines", type=int, default=1, metavar="M", help="machines (default 1)")
    p.add_argument("--machine-rank", type=int, default=0, metavar="R", help="this machine's number, 0..M-1")
    p.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST0:PORT (default: a free local port)")
    p.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change, in pairs")
    return add_debug_flag(p)


def main() -> int:
    args = parser().parse_intermixed_args()

    from blpseg.engine import run

    return run(args)


if __name__ == "__main__":
    run_command(main)
