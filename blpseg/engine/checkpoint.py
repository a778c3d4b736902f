"""Weights and checkpoints: read without running anything from them, written so that none is ever lost."""

from __future__ import annotations

import collections
import functools
import logging
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager
from torch import nn

from ..errors import BLPSegError, describe

__all__ = ["Checkpointer", "load_file", "load_weights", "provenance", "save_atomic", "write_atomic"]

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------- safe reading
def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    """What pickles of protocol 2 call ``_codecs.encode`` for: bytes spelled as text. Any other codec is refused."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


_HARMLESS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1_bytes,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "bytearray"): bytearray,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays and plain containers; everything else a pickle may call is refused by name."""

    def find_class(self, module: str, name: str):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]
        try:
            return _HARMLESS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it would call {module}.{name}") from None


def fetch(path: str) -> str:
    """The local file behind ``path`` (downloaded and cached if it is a URL); :class:`BLPSegError` when there is "
    "none."""
    try:
        local = PathManager.get_local_path(path)
    except Exception as error:  # every scheme of PathManager fails in its own way
        name = path.split("://", 1)[-1]
        cache = Path(os.path.expanduser(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")))
        place = cache / ("detectron2/" + name if path.startswith("detectron2://") else name.split("/", 1)[-1])
        raise BLPSegError(
            f"{path}: cannot be fetched ({describe(error)}); download it elsewhere and put it at {place}, or set "
            "MODEL.WEIGHTS to where it lies"
        ) from error
    if not os.path.isfile(local):
        raise BLPSegError(f"{path}: no such file; set MODEL.WEIGHTS to a checkpoint or weights file")
    return local


def load_file(path: str, *, trust: bool = False) -> dict:
    """Read a ``.pth`` or ``.pkl`` file without executing anything from it.

    Args:
        path: anything PathManager opens. ``.pkl`` files (Detectron2's model zoo) may hold NumPy arrays and
            plain containers, every other file what ``torch.load(weights_only=True)`` admits.
        trust: read it with plain pickle, which runs whatever code the file carries. Warns.

    Returns:
        the mapping that the file holds, tensors on the CPU.

    Raises:
        BLPSegError: no such file, a broken file, or one that holds more than data.
    """
    local = fetch(path)
    if trust:
        logger.warning(f"{path}: --trust-checkpoint: any code in this file runs now")
    try:
        if path.endswith(".pkl"):
            with open(local, "rb") as file:
                data = (pickle.Unpickler if trust else _ArrayUnpickler)(file, encoding="latin1").load()
        else:
            data = torch.load(local, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|(it would call \S+|codec \S+|Unsupported operand \d+)", str(error))
        if found is None:
            reason = describe(error)[:120]
            raise BLPSegError(f"{path}: not a readable weights file ({reason}); fetch it again") from error
        raise BLPSegError(
            f"{path}: refused, it holds more than tensors and plain containers ({found[1] or found[2]}); get it "
            "as plain "
            "tensors, or pass --trust-checkpoint if you trust whoever made it"
        ) from error
    except OSError:
        raise
    except Exception as error:  # broken files fail in torch, zipfile or pickle with a dozen different exceptions
        raise BLPSegError(
            f"{path}: truncated or not a weights file ({type(error).__name__}: {describe(error)[:120]}); fetch it again"
        ) from error
    if not isinstance(data, dict):
        raise BLPSegError(f"{path}: expected a mapping of names to weights, found {type(data).__name__}")
    return data


# ------------------------------------------------------------------------------------------ weights into a model
def load_weights(
    model: nn.Module, path: str, *, complete: bool, other_classes: bool = False, trust: bool = False
) -> None:
    """Load ``MODEL.WEIGHTS`` into ``model``.

    Names that do not start at the model's root (a backbone file: ``stem.conv1.weight``, ``res2...``, also in
    Caffe2's spelling) are matched to it as Detectron2's ``DetectionCheckpointer`` does.

    Args:
        model: on any device, not wrapped.
        path: anything PathManager opens, see :func:`load_file`.
        complete: every parameter must be in the file (evaluation); otherwise a whole backbone is enough.
        other_classes: weights whose shape differs keep their initial values instead of being refused.
        trust: see :func:`load_file`.

    Raises:
        BLPSegError: the file does not fit; the message says which key would.
    """
    data = load_file(path, trust=trust)
    weights = data.get("model", data.get("model_state", data.get("state_dict", data)))
    if not isinstance(weights, dict):
        raise BLPSegError(f"{path}: its 'model' is {type(weights).__name__}, not a mapping of names to weights")
    weights = {k.removeprefix("module."): torch.as_tensor(v) for k, v in weights.items() if _is_numeric(v)}
    own = model.state_dict()
    if not any(name in own for name in weights):
        caffe2 = path.endswith(".pkl") and "__author__" not in data or data.get("__author__") == "Caffe2"
        with _quiet("detectron2.checkpoint.c2_model_loading"):
            weights = align_and_update_state_dicts(own, weights, c2_conversion=caffe2)
    wrong = {k: v.shape for k, v in weights.items() if k in own and v.shape != own[k].shape}
    if wrong and not other_classes:
        raise BLPSegError(f"{path}: {_shape_message(model, data, wrong)}")
    loaded = {k: v for k, v in weights.items() if k in own and k not in wrong}
    if not loaded:
        raise BLPSegError(f"{path}: none of its {len(weights)} weights fits this model; is it the right file?")
    missing = [k for k in own if k not in loaded and not k.endswith("num_batches_tracked")]
    needed = [k for k in missing if k not in wrong and (complete or k.startswith("backbone."))]
    if needed:
        raise BLPSegError(
            f"{path}: lacks {len(needed)} of the model's weights ({needed[0]}, ...); "
            + (
                "do MODEL.RESNETS.DEPTH and STEM_TYPE fit the file?"
                if needed[0].startswith("backbone.")
                else "evaluation needs the checkpoint of a trained model, made with this config"
            )
        )
    model.load_state_dict(loaded, strict=False)
    extra = len([k for k in weights if k not in own])
    logger.info(
        f"{path}: loaded {len(loaded)} weights; {len(missing)} of the model keep their initial values"
        + (f"; {extra} have no place in the model" if extra else "")
    )


def _is_numeric(value) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _shape_message(model: nn.Module, data: dict, wrong: dict[str, torch.Size]) -> str:
    name, shape = next(iter(wrong.items()))
    own = model.state_dict()
    heads = ("sem_seg_head.", "annotation_head.")
    if all(k.startswith(heads) for k in wrong):
        for k, found in wrong.items():
            if k.startswith("sem_seg_head."):
                return (
                    f"made for {found[0]} classes, the config has MODEL.SEM_SEG_HEAD.NUM_CLASSES {own[k].shape[0]}; "
                    f"set it to {found[0]}, or start the class layers anew with SOLVER.FINETUNE_OTHER_CLASSES True"
                )
    return (
        f"{len(wrong)} weights have another shape than the model's ({name}: {tuple(shape)} in the file, "
        f"{tuple(own[name].shape)} in the model); use the config it was made with"
    )


class _quiet:
    """Detectron2's matching prints a table of every weight; one line of ours replaces it."""

    def __init__(self, name: str):
        self.logger = logging.getLogger(name)

    def __enter__(self):
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_):
        self.logger.setLevel(self.level)


# ------------------------------------------------------------------------------------------------------ writing
class _Sink:
    """A file for ``torch.save`` that keeps the first write error: raised inside torch's zip writer it would abort."""

    def __init__(self, file):
        self.file = file
        self.error: OSError | None = None

    def write(self, data) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def write_atomic(path: str | os.PathLike, write) -> None:
    """Call ``write(file)`` on a temporary binary file beside ``path``, flush it to the disk, rename it to ``path``.

    Raises:
        OSError: with the path in it; ``path`` is as it was and the temporary file is gone.
    """
    path = os.fspath(path)
    if "://" in path:  # object stores show a file only once it is complete
        with PathManager.open(path, "wb") as file:
            write(file)
        return
    temporary = os.path.join(os.path.dirname(path) or ".", f".{os.path.basename(path)}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", buffering=1 << 20) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass  # it was never made, or the file system is gone; the first error is the one to tell
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path}: cannot be written: {error.strerror or error}") from error
        raise
    _sync_folder(os.path.dirname(path) or ".")


def save_atomic(path: str, data: dict) -> None:
    """``torch.save`` through :func:`write_atomic`."""

    def write(file):
        sink = _Sink(file)
        torch.save(data, sink)
        if sink.error is not None:
            raise sink.error

    write_atomic(path, write)


def _sync_folder(folder: str) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows cannot open folders
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse; the rename itself is done
    finally:
        os.close(handle)


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
    ``model_best.pth`` and ``model_final.pth`` are further names (hard links) of such files.
    """

    def __init__(self, output_dir: str, keep: int):
        """
        Args:
            output_dir: an existing folder, local or remote.
            keep: how many of the newest numbered checkpoints stay; at least 1.
        """
        self.output_dir = output_dir
        self.keep = keep

    def path(self, iteration: int) -> str:
        return os.path.join(self.output_dir, f"model_{iteration:07d}.pth")

    def iterations(self) -> list[int]:
        """Iterations that have a checkpoint, newest first."""
        if not PathManager.isdir(self.output_dir):
            return []
        names = (re.fullmatch(r"model_(\d{7,})\.pth", name) for name in PathManager.ls(self.output_dir))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def save(self, state: dict, iteration: int) -> str:
        """Write the checkpoint of ``iteration``, then delete those beyond ``keep``; the path."""
        path = self.path(iteration)
        save_atomic(path, state)
        write_atomic(
            os.path.join(self.output_dir, "last_checkpoint"), lambda file: file.write(os.path.basename(path).encode())
        )
        # Newer ones than this are of a run that was resumed from an older checkpoint; they are void now.
        kept = [i for i in self.iterations() if i <= iteration][: self.keep]
        for old in self.iterations():
            if old not in kept:
                PathManager.rm(self.path(old))
        return path

    def name_best(self, iteration: int) -> None:
        self._link(iteration, "model_best.pth")

    def name_final(self, iteration: int) -> None:
        self._link(iteration, "model_final.pth")

    def _link(self, iteration: int, name: str) -> None:
        source, target = self.path(iteration), os.path.join(self.output_dir, name)
        if "://" in target:
            PathManager.copy(source, target, overwrite=True)
            return
        temporary = os.path.join(self.output_dir, f".{name}.{os.getpid()}.tmp")
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            with open(source, "rb") as file:
                content = file.read()
            write_atomic(target, lambda out: out.write(content))
            return
        os.replace(temporary, target)

    def remove_temporary_files(self) -> None:
        """Delete what a killed process was writing. Only while nobody else writes here."""
        if "://" in self.output_dir or not os.path.isdir(self.output_dir):
            return
        for name in os.listdir(self.output_dir):
            if re.fullmatch(r"\.(model_\w+\.pth|last_checkpoint|\w+\.(json|yaml))\.\d+\.tmp", name):
                os.unlink(os.path.join(self.output_dir, name))

    def readable(self, *, trust: bool = False) -> Iterator[tuple[str, dict]]:
        """(path, state) of the checkpoints that can be read, newest first; a broken one is reported in a line."""
        for iteration in self.iterations():
            path = self.path(iteration)
            try:
                self._verify(path)
                state = load_file(path, trust=trust)
                if state.get("iteration") != iteration or "optimizer" not in state:
                    raise BLPSegError(f"{path}: not a checkpoint of a training run")
            except (BLPSegError, OSError) as error:
                logger.warning(f"checkpoint skipped, the one before it is tried: {describe(error)}")
                continue
            yield path, state

    @staticmethod
    def _verify(path: str) -> None:
        """Compare every record with its checksum; torch.load does not."""
        local = PathManager.get_local_path(path)
        try:
            with zipfile.ZipFile(local) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zipfile.zlib.error) as error:
            raise BLPSegError(f"{path}: truncated or not a checkpoint ({describe(error)})") from error
        if broken is not None:
            raise BLPSegError(f"{path}: damaged (checksum of {broken})")
