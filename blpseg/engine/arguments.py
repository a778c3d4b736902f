"""The flags of a training script. Imports neither PyTorch nor Detectron2: ``--help`` answers at once."""

from __future__ import annotations

import argparse

from ..utils.cli import add_debug_flag


def argument_parser(description: str = "", epilog: str = "") -> argparse.ArgumentParser:
    """The flags of a training script: those of :func:`detectron2.engine.default_argument_parser` and a few more.

    KEY VALUE pairs may stand anywhere among the flags with ``parse_intermixed_args``.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="YAML config (default: none)")
    add("--resume", action="store_true", help="continue from the newest readable checkpoint in OUTPUT_DIR")
    add("--overwrite", action="store_true", help="delete the checkpoints and metrics that OUTPUT_DIR holds")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST, no training")
    add("--replay", default="", metavar="DUMP", help="repeat the step of a dump_*.pth that NaN left")
    add("--trust-checkpoint", action="store_true", help="read weights with plain pickle, which can run code they carry")
    processes = "processes on this machine: one a GPU, or on the CPU (default 1)"
    add("--num-gpus", type=int, default=1, metavar="N", help=processes)
    add("--num-machines", type=int, default=1, metavar="M", help="machines (default 1)")
    add("--machine-rank", type=int, default=0, metavar="R", help="this machine's number, 0..M-1")
    add("--dist-url", default="auto", metavar="URL", help="tcp://HOST0:PORT (default: a free local port)")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys to change, in pairs")
    return add_debug_flag(parser)
