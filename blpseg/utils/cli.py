"""Shared by all command lines: flags, and the exit with one line of error."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import debug_enabled, one_line
from .imports import defer_compiler
from .threads import wait_passively

# Console script -> the module of tools/ or datasets/ whose main() it runs.
_CONSOLE = {
    "blpseg-train": "tools.train_net",
    "blpseg-demo": "tools.demo",
    "blpseg-check": "tools.check_dataset",
    "blpseg-annotate": "tools.annotate",
    "blpseg-new-project": "tools.new_project",
    "blpseg-visualize": "tools.visualize_data",
    "blpseg-convert": "tools.convert_checkpoint",
    "blpseg-export": "tools.export_model",
    "blpseg-label-preference": "tools.label_preference",
    "blpseg-make-synthetic": "prepare.make_synthetic",
    "blpseg-prepare-scribbles": "prepare.prepare_scribbles",
    "blpseg-simulate-scribbles": "prepare.simulate_scribbles",
}

# Keys by Detectron2's top-level names; others stand after --opts, or after everything else.
_CONFIG_KEY = re.compile(
    r"(MODEL|INPUT|DATASETS|DATALOADER|SOLVER|TEST|OUTPUT|GLOBAL)(\.[A-Z0-9_]+)+|OUTPUT_DIR|SEED|CUDNN_BENCHMARK|VIS_PERIOD"
)

INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C


def add_debug_flag(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a command line ``--debug``; it is kept in the environment so that child processes see it."""

    class _Debug(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            os.environ["BLPSEG_DEBUG"] = "1"
            setattr(namespace, self.dest, True)

    parser.add_argument("--debug", action=_Debug, nargs=0, default=False, help="show tracebacks of errors")
    return parser


def add_work_flags(parser: argparse.ArgumentParser, force: str = "") -> argparse.ArgumentParser:
    """Give a command line ``--workers`` and, with a help text for it, ``--force``."""
    parser.add_argument("--workers", type=count, metavar="N", help="processes (default: the CPUs there are)")
    if force:
        parser.add_argument("--force", action="store_true", help=force)
    return add_debug_flag(parser)


def parse_with_opts(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line that may change config keys; the result's ``opts`` is the list of keys and values.

    ``KEY VALUE`` pairs may follow ``--opts`` or stand anywhere, also after an option that takes several values.
    ``argv`` is by default that of the process.
    """
    if not any(action.dest == "opts" for action in parser._actions):
        parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change, in pairs")
    rest, found, last = list(sys.argv[1:] if argv is None else argv), [], []
    if "--opts" in rest:
        at = rest.index("--opts")
        rest, last = rest[:at], rest[at + 1 :]
    place = 0
    while place < len(rest):
        if _CONFIG_KEY.fullmatch(rest[place]):
            found += rest[place : place + 2]
            del rest[place : place + 2]
        else:
            place += 1
    args = parser.parse_intermixed_args(rest)
    args.opts = [*args.opts, *found, *last]
    return args


def fraction(text: str) -> float:
    """A number from 0 to 1, for the ``type`` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number within 0..1")
    return value


def count(text: str) -> int:
    """A whole number of at least 1, for the ``type`` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def console() -> None:
    """Entry point of every console script: runs the command line that belongs to the script's name (pyproject.toml)."""
    module = importlib.import_module(f"blpseg.{_CONSOLE[Path(sys.argv[0]).stem]}")
    run_command(module.main)


def run_command(main: Callable[..., int | None], *args) -> None:
    """Call ``main(*args)`` and leave the process with its exit status.

    An error becomes one line on stderr (:func:`one_line`) and status 1; ``--debug`` or ``BLPSEG_DEBUG=1`` adds the
    traceback.

    Args:
        main: returns an exit status, or None for 0.
        *args: passed on.

    Raises:
        SystemExit: always.
    """
    wait_passively()
    defer_compiler()
    try:
        status = main(*args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if debug_enabled():
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        status = 1
    sys.exit(status)
