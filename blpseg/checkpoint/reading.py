"""Weights files: read without running anything from them."""

from __future__ import annotations

import collections
import logging
import os
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from ..utils.errors import BLPSegError, describe

__all__ = ["fetch", "load_file"]

logger = logging.getLogger(__name__)


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
