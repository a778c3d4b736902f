"""The output directory: one experiment each, one process at a time, logs that notice a full disk."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import sys

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..checkpoint import Checkpointer, write_atomic
from ..config import flatten
from ..utils.errors import BLPSegError, debug_enabled

__all__ = ["OutputDir", "changed_keys", "setup_logging"]

# Keys that change where and how fast a run goes, not what it computes.
HARMLESS = re.compile(
    r"OUTPUT_DIR$|OUTPUT\.|DATALOADER\.NUM_WORKERS$|MODEL\.DEVICE$|TEST\.|VIS_PERIOD$|CUDNN_BENCHMARK$|VERSION$|"
    r"SOLVER\.(CHECKPOINT_PERIOD|CHANNELS_LAST|COMPILE)$|DATASETS\.TEST$"
)
OURS = re.compile(r"model_(\d{7,}|best|final)\.pth|last_checkpoint|(metrics|evaluations)\.json|events\.out\.tfevents.*")


def changed_keys(before: str, cfg: CfgNode) -> list[str]:
    """``KEY: old -> new`` for every key that matters and differs between a dumped config and ``cfg``."""
    old, new = (flatten(yaml.safe_load(text) or {}) for text in (before, cfg.dump()))
    keys = [k for k in sorted(old.keys() | new.keys()) if not HARMLESS.match(k) and old.get(k) != new.get(k)]
    # -1 asks for any seed; the dumped config has the one that was drawn.
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in keys if not (k == "SEED" and new[k] < 0)]


class OutputDir:
    """``cfg.OUTPUT_DIR`` for the time of a training run; only the main process holds one."""

    def __init__(self, cfg: CfgNode):
        self.path = cfg.OUTPUT_DIR
        self.cfg = cfg
        self._lock = None

    def __truediv__(self, name: str) -> str:
        return os.path.join(self.path, name)

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, lock it and see that no other experiment's results are in the way.

        Raises:
            BLPSegError: another process trains in it; or it holds results and neither ``resume`` nor ``overwrite``
                was asked for.
        """
        PathManager.mkdirs(self.path)
        self._acquire_lock()
        checkpoints = Checkpointer(self.path, 1)
        checkpoints.remove_temporary_files()
        if resume:
            return
        if overwrite:
            for name in PathManager.ls(self.path):
                if OURS.fullmatch(name):
                    PathManager.rm(self / name)
            return
        stored = self._read("config.yaml")
        changed = changed_keys(stored, self.cfg) if stored else []
        iterations = checkpoints.iterations()
        ways = "choose another OUTPUT_DIR, or replace it with --overwrite"
        if changed and (iterations or self._read("metrics.json")):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise BLPSegError(f"{self.path}: holds another experiment ({'; '.join(changed[:3])}{more}); {ways}")
        if iterations:
            raise BLPSegError(
                f"{self.path}: holds checkpoints of this experiment up to iteration {iterations[0]}; go on with "
                f"--resume, {ways}"
            )

    def start(self, iteration: int) -> None:
        """Store the config, and drop the lines of metrics.json that a resumed run will write again."""
        write_atomic(self / "config.yaml", lambda file: file.write(self.cfg.dump().encode()))
        lines = self._read("metrics.json").splitlines(keepends=True)
        kept = [line for line in lines if _iteration(line) < iteration]
        if kept != lines:
            write_atomic(self / "metrics.json", lambda file: file.write("".join(kept).encode()))

    def _read(self, name: str) -> str:
        if not PathManager.isfile(self / name):
            return ""
        with PathManager.open(self / name, "r") as file:
            return file.read()

    def _acquire_lock(self) -> None:
        if "://" in self.path:
            return
        handle = open(self / ".lock", "a+")
        try:
            # lockf, not flock: forked loader workers do not inherit it, and a killed process lets go of it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BLPSegError(
                f"{self.path}: another process trains in it right now; wait for it, end it, or choose another "
                "OUTPUT_DIR"
            ) from None
        except OSError:
            return  # a file system without locks
        self._lock = handle


def _iteration(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off by a kill


class _StrictStreamHandler(logging.StreamHandler):
    """A log file whose write errors end the run: logging's own handling prints a traceback and goes on."""

    def __init__(self, path: str):
        super().__init__(PathManager.open(path, "a"))
        self.path = path

    def handleError(self, record):  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{self.path}: cannot be written: {error.strerror}") from error
        raise error


def setup_logging(output_dir: str, rank: int) -> None:
    """Log to stdout (rank 0) and to ``output_dir``/log.txt (``log.txt.rank1`` ... for the others), as "
    "Detectron2 does."""
    color = sys.stdout.isatty()
    for name in ("blpseg", "detectron2", "fvcore"):
        setup_logger(None, rank, color=color, name=name)
    logging.getLogger("detectron2.data.common").setLevel(logging.WARNING)  # how it stores the list of records
    # A full disk under a redirected stdout must not print a traceback a line; log.txt below tells of it.
    logging.raiseExceptions = debug_enabled()
    if not output_dir:
        return
    PathManager.mkdirs(output_dir)
    path = os.path.join(output_dir, "log.txt" if rank == 0 else f"log.txt.rank{rank}")
    handler = _StrictStreamHandler(path)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S"))
    for name in ("blpseg", "detectron2", "fvcore"):
        logging.getLogger(name).addHandler(handler)
