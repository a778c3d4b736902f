"""The output directory: one experiment each, one process at a time, logs that notice a full disk."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import IO

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import Checkpointer
from ..config import flatten
from ..utils.errors import BLPSegError, debug_enabled
from ..utils.files import lock_file, write_bytes_atomic
from ..utils.yaml_files import parse_yaml
from .agreement import on_main

LOGGERS = ("blpseg", "detectron2", "fvcore")

# Keys that change where and how fast a run goes, not what it computes.
HARMLESS = re.compile(
    r"OUTPUT_DIR$|OUTPUT\.|DATALOADER\.NUM_WORKERS$|MODEL\.DEVICE$|TEST\.|VIS_PERIOD$|CUDNN_BENCHMARK$|VERSION$|"
    r"SOLVER\.(CHECKPOINT_PERIOD|CHANNELS_LAST|COMPILE)$|DATASETS\.TEST$"
)
_MODELS = ("model_final.pth", "model_best.pth")
_WAYS = "choose another OUTPUT_DIR, or replace it with --overwrite"
OURS = re.compile(r"model_(\d{7,}|best|final)\.pth|last_checkpoint|(metrics|evaluations)\.json|events\.out\.tfevents.*")


def changed_keys(before: str, cfg: CfgNode, source: str) -> list[str]:
    """``KEY: old -> new`` for every key that matters and differs between a dumped config and ``cfg``. Raises
    BLPSegError if ``before``, of the file ``source``, is no config."""
    stored = parse_yaml(before, source)
    if not isinstance(stored, dict):
        raise BLPSegError(f"{source}: damaged, it holds no config")
    old, new = flatten(stored), flatten(parse_yaml(cfg.dump(), "config"))
    keys = [k for k in sorted(old.keys() | new.keys()) if not HARMLESS.match(k) and old.get(k) != new.get(k)]
    # -1 asks for any seed; the dumped config has the one that was drawn.
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in keys if not (k == "SEED" and new[k] < 0)]


_locks: dict[str, object] = {}  # claimed folders of this process; a lock lasts as long as its file is open


def claim_output_dir(cfg: CfgNode, *, resume: bool = False, overwrite: bool = False) -> bool:
    """Make ``cfg.OUTPUT_DIR``, lock it for this run, check that it holds no other results, and log to it.

    Every process of the run must call it; False when it has claimed the folder before. ``resume`` goes on with the
    results that are there, ``overwrite`` deletes them.

    Raises:
        BLPSegError: another process trains in the folder; or it holds results and neither was asked for.
    """
    path = cfg.OUTPUT_DIR
    if path in _locks:
        return False
    _locks[path] = on_main(lambda: _claim(cfg, path, resume, overwrite))
    setup_logging(path, comm.get_rank())
    return True


def release_output_dir(path: str) -> None:
    """Let other runs claim the folder."""
    handle = _locks.pop(path, None)
    if handle is not None:
        handle.close()


def _claim(cfg: CfgNode, path: str, resume: bool, overwrite: bool):
    os.makedirs(path, exist_ok=True)
    _refuse_links(path)
    handle = lock_file(os.path.join(path, ".lock"))
    if handle is None:
        raise BLPSegError(
            f"{path}: another process trains in it right now; wait for it, end it, or choose another OUTPUT_DIR"
        )
    checkpoints = Checkpointer(path, 1)
    checkpoints.remove_temporary_files()
    if overwrite and not resume:
        for name in filter(OURS.fullmatch, os.listdir(path)):
            os.unlink(os.path.join(path, name))
    elif not checkpoints.iterations() and (kept := [n for n in _MODELS if os.path.exists(os.path.join(path, n))]):
        raise BLPSegError(f"{path}: holds the {kept[0]} of another run; {_WAYS}")
    elif not resume:
        _refuse_results(cfg, path, checkpoints.iterations())
    return handle


def _refuse_links(path: str) -> None:
    """A run must write neither through a link into another folder nor into a pipe, which waits for ever."""
    for name in (".lock", "config.yaml", "evaluations.json", "last_checkpoint", "log.txt", "metrics.json"):
        file = os.path.join(path, name)
        if os.path.lexists(file) and (os.path.islink(file) or not os.path.isfile(file)):
            raise BLPSegError(f"{file}: a symbolic link, a folder or a pipe where a run writes a file; move it away")


def _refuse_results(cfg: CfgNode, path: str, iterations: list[int]) -> None:
    changed = []
    if (stored := _read(path, "config.yaml")) and (iterations or _read(path, "metrics.json")):
        try:
            changed = changed_keys(stored, cfg, os.path.join(path, "config.yaml"))
        except BLPSegError as error:
            raise BLPSegError(f"{error}; restore it, {_WAYS}") from error
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise BLPSegError(f"{path}: holds another experiment ({'; '.join(changed[:3])}{more}); {_WAYS}")
    if iterations:
        raise BLPSegError(f"{path}: holds checkpoints up to iteration {iterations[0]}; go on with --resume, {_WAYS}")


def open_to_append(path: str) -> IO:
    """A file of the output directory, made if it is missing, never through a link to a file of somebody else."""
    return open(path, "a", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def start_records(path: str, config_text: str, iteration: int) -> None:
    """Store the config, and drop the lines of metrics.json that a run from ``iteration`` on will write again."""
    write_bytes_atomic(os.path.join(path, "config.yaml"), config_text.encode(), durable=True)
    lines = _read(path, "metrics.json").splitlines(keepends=True)
    kept = [line for line in lines if _iteration(line) < iteration]
    if kept != lines:
        write_bytes_atomic(os.path.join(path, "metrics.json"), "".join(kept).encode(), durable=True)


def _read(path: str, name: str) -> str:
    file = Path(path, name)
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _iteration(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")  # cut off by a kill, or damaged


class _StrictStreamHandler(logging.StreamHandler):
    """A log file whose write errors end the run: logging's own handling prints a traceback and goes on."""

    def __init__(self, path: str):
        super().__init__(open_to_append(path))
        self.path = path

    def handleError(self, record):  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{self.path}: cannot be written: {error.strerror}") from error
        raise error


def setup_logging(output_dir: str = "", rank: int = 0) -> None:
    """Log to stdout (rank 0), and to ``output_dir``/log.txt (``log.txt.rank1`` ... for the others) if it is given, as
    Detectron2 does."""
    color = sys.stdout.isatty()
    for name in LOGGERS:
        setup_logger(None, rank, color=color, name=name)
    logging.getLogger("detectron2.data.common").setLevel(logging.WARNING)  # how it stores the list of records
    # A full disk under a redirected stdout must not print a traceback a line; log.txt below reports it.
    logging.raiseExceptions = debug_enabled()
    if not output_dir:
        return
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, "log.txt" if rank == 0 else f"log.txt.rank{rank}")
    handler = _StrictStreamHandler(path)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S"))
    for name in LOGGERS:
        for earlier in [h for h in logging.getLogger(name).handlers if isinstance(h, _StrictStreamHandler)]:
            logging.getLogger(name).removeHandler(earlier)  # of an earlier run of this process
        logging.getLogger(name).addHandler(handler)
