"""Writing checkpoints without ever losing one."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..utils.errors import BLPSegError, describe
from ..utils.files import write_atomic, write_bytes_atomic
from ..utils.weights_files import DIGEST_LENGTH, DIGEST_MARK, check_finite, load_file

logger = logging.getLogger(__name__)

_END_RECORD = 22  # bytes of a zip's end record without a comment


class _Sink:
    """A file for ``torch.save`` that adds the digest which :func:`.load_file` verifies.

    It keeps the first write error: raised inside torch's zip writer it would abort the process.
    """

    def __init__(self, file):
        self.file = file
        self.error: OSError | None = None
        self._digest = hashlib.sha256()
        self._held = b""  # the last 22 bytes so far: at the end they are the zip's end record, which counts its comment

    def write(self, data) -> int:
        end = bytes(data[-_END_RECORD:])
        if len(end) < _END_RECORD:
            data, end = self._held + end, (self._held + end)[-_END_RECORD:]
        else:
            self._emit(self._held)
        self._emit(memoryview(data)[: len(data) - len(end)])
        self._held = end
        return len(data)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        """Write the end record with the digest as the zip's comment; raise the first write error."""
        length = len(DIGEST_MARK) + DIGEST_LENGTH
        self._emit(self._held[:-2] + length.to_bytes(2, "little") + DIGEST_MARK)
        self._emit(self._digest.hexdigest().encode())
        if self.error is not None:
            raise self.error

    def _emit(self, data) -> None:
        if self.error is None:
            try:
                self.file.write(data)
                self._digest.update(data)
            except OSError as error:
                self.error = error


def save_atomic(path: str, data: dict) -> None:
    """``torch.save`` through :func:`write_atomic`, with a digest by which :func:`.load_file` finds any damage."""

    def write(file):
        sink = _Sink(file)
        torch.save(data, sink)
        sink.finish()

    write_atomic(path, write)


@functools.lru_cache
def provenance() -> dict[str, str]:
    """Versions and git revision, to be stored with a checkpoint.

    The revision ends in ``-dirty`` where code or configs differ from it; documents do not count.
    """
    import detectron2
    import torchvision

    from .. import __version__

    root = Path(__file__).resolve().parents[2]
    try:
        if not (root / ".git").exists():  # installed, below some other repository perhaps
            raise FileNotFoundError(root / ".git")
        git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=20, check=True)
        revision = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        code = ["blpseg", "configs", "tools", ":(glob)datasets/*.py"]
        if git(["git", "--no-optional-locks", "status", "--porcelain", "--", *code]).stdout:
            revision += "-dirty"
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    return {
        "blpseg": __version__,
        "git_revision": revision,
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "detectron2": str(detectron2.__version__),
        "numpy": str(np.__version__),
    }


class Checkpointer:
    """The checkpoints of one output directory.

    ``model_0000099.pth`` holds the state after iteration 99 (the 100th), the name Detectron2 gives it;
    ``model_best.pth`` and ``model_final.pth`` are further names (hard links) of such files, or slim copies.
    """

    def __init__(self, output_dir: str, keep: int, *, slim: bool = False):
        """
        Args:
            output_dir: an existing folder.
            keep: how many of the newest numbered checkpoints stay. Raises BLPSegError for less than 1.
            slim: leave the state of the optimiser and of losses (a mean teacher) out of ``model_best.pth`` and
                ``model_final.pth``.
        """
        if keep < 1:
            raise BLPSegError(f"OUTPUT.KEEP_CHECKPOINTS {keep}: at least 1 must stay to go on from")
        self.output_dir = output_dir
        self.keep = keep
        self.slim = slim

    def path(self, iteration: int) -> str:
        return os.path.join(self.output_dir, f"model_{iteration:07d}.pth")

    def iterations(self) -> list[int]:
        """Iterations that have a checkpoint, newest first."""
        names = (re.fullmatch(r"model_(\d{7,})\.pth", path.name) for path in Path(self.output_dir).glob("model_*.pth"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def save(self, state: dict, iteration: int) -> str:
        """Write the checkpoint of ``iteration``, then delete those beyond ``keep``; the path."""
        path = self.path(iteration)
        save_atomic(path, state)
        last = os.path.join(self.output_dir, "last_checkpoint")
        write_bytes_atomic(last, os.path.basename(path).encode(), durable=True)
        # Newer ones than this are of a run that was resumed from an older checkpoint; they are void now.
        kept = [i for i in self.iterations() if i <= iteration][: self.keep]
        for old in self.iterations():
            if old not in kept:
                os.unlink(self.path(old))
        return path

    def name_best(self, iteration: int) -> None:
        self._link(iteration, "model_best.pth")

    def name_final(self, iteration: int) -> str:
        self._link(iteration, "model_final.pth")
        return os.path.join(self.output_dir, "model_final.pth")

    def _link(self, iteration: int, name: str) -> None:
        source, target = self.path(iteration), os.path.join(self.output_dir, name)
        if self.slim:
            state = {key: value for key, value in load_file(source).items() if key != "optimizer"}
            state["model"] = {k: value for k, value in state["model"].items() if not k.startswith("losses.")}
            save_atomic(target, state)
            return
        temporary = os.path.join(self.output_dir, f".{name}.{os.getpid()}.tmp")
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            write_bytes_atomic(target, Path(source).read_bytes(), durable=True)
            return
        os.replace(temporary, target)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # it stays where both were names of one file already

    def remove_temporary_files(self) -> None:
        """Delete what a killed process was writing. Call it only while no other process writes here."""
        for name in os.listdir(self.output_dir):
            if re.fullmatch(r"\.(model_\w+\.pth|last_checkpoint|\w+\.(json|yaml)|dump_\w+\.pth)\.\d+\.tmp", name):
                os.unlink(os.path.join(self.output_dir, name))

    def readable(self, *, trust: bool = False) -> Iterator[tuple[str, dict]]:
        """(path, state) of the checkpoints that can be read, newest first; a broken one is reported in a line."""
        for iteration in self.iterations():
            path = self.path(iteration)
            try:
                state = load_file(path, trust=trust)
                _check_fields(path, state, iteration)
            except (BLPSegError, OSError) as error:
                logger.warning(f"checkpoint skipped, the one before it is tried: {describe(error)}")
                continue
            yield path, state


_FIELDS = {
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "iteration": int,
    "seed": int,
    "world_size": int,
    "config": str,
}


def _check_fields(path: str, state: dict, iteration: int) -> None:
    """Raises BLPSegError unless ``state`` is what :meth:`.Trainer.state` gave after ``iteration``, all of it finite."""
    odd = [name for name, kind in _FIELDS.items() if not isinstance(state.get(name), kind)]
    if odd or state["iteration"] != iteration:
        raise BLPSegError(
            f"{path}: not a checkpoint of a training run after iteration {iteration} (its {odd or 'number'})"
        )
    if not isinstance(state["optimizer"].get("state"), dict) or state["seed"] < 0 or state["world_size"] < 1:
        raise BLPSegError(f"{path}: damaged (its optimizer, seed or world_size)")
    check_finite(path, state["model"])
