"""Weights files: verified, bounded, and read without running anything from them. The only way in for all of them."""

from __future__ import annotations

import collections
import hashlib
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
import torch

from .downloads import fetch
from .errors import BLPSegError, describe
from .pickles import check_pickle

logger = logging.getLogger(__name__)

# Checkpoints of ours end in a zip comment with the SHA-256 of every byte before it (checkpoint/writing.py).
DIGEST_MARK = b"sha256:"
DIGEST_LENGTH = 64
_LEGACY_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch's format before 1.6 begins with
_STATE_KEYS = ("model", "model_state", "state_dict")
_TORCH_FLAGS = 0x0808  # of a zip record: sizes follow the data, UTF-8 name


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    """What pickles of protocol 2 call ``_codecs.encode`` for: bytes spelled as text. Any other codec is refused."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


def _bytearray(*arguments) -> bytearray:
    """``bytearray`` of bytes or text; ``bytearray(n)`` would allocate n bytes."""
    if arguments and not isinstance(arguments[0], (bytes, str)):
        raise pickle.UnpicklingError("bytearray of another kind")
    return bytearray(*arguments)


_HARMLESS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1_bytes,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "bytearray"): _bytearray,
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


def load_file(path: str, *, trust: bool = False) -> dict:
    """Read a weights file or checkpoint without executing anything from it.

    The content decides the kind. A zip of ``torch.save`` must be whole: a checkpoint of ours by its own SHA-256,
    any other by the checksums of its records. A pickle has no checksum; :func:`.fetch` compares it with a digest
    where the path ends in ``#sha256=...``.

    Args:
        path: anything :func:`.fetch` takes. ``torch.save``'s files may hold what ``torch.load(weights_only=True)``
            admits, pickles of Detectron2's model zoo NumPy arrays and plain containers.
        trust: read it with plain pickle, which runs whatever code the file carries. Warns.

    Returns:
        the mapping that the file holds, tensors on the CPU.

    Raises:
        BLPSegError: no such file, a damaged file, or one that holds more than data.
    """
    local = fetch(path)
    if trust:
        logger.warning(f"{path}: --trust-checkpoint: any code in this file runs now")
    try:
        with open(local, "rb") as file:
            data = _load(file, path, trust)
    except pickle.UnpicklingError as error:
        found = re.search(
            r"GLOBAL (\S+)|(it would call \S+|codec \S+|bytearray of .*|Unsupported operand \d+)", str(error)
        )
        if found is None:
            raise BLPSegError(f"{path}: not a weights file ({describe(error)[:120]}); fetch it again") from error
        raise BLPSegError(
            f"{path}: refused, it holds more than tensors and plain containers ({found[1] or found[2]}); get it as "
            "plain tensors, or pass --trust-checkpoint if you trust whoever made it"
        ) from error
    except BLPSegError:
        raise
    except Exception as error:  # broken files fail in torch, zipfile or pickle with a dozen different exceptions
        raise BLPSegError(
            f"{path}: damaged or not a weights file ({type(error).__name__}: {describe(error)[:120]}); fetch it again"
        ) from error
    if not isinstance(data, dict):
        raise BLPSegError(f"{path}: expected a mapping of names to weights, found {type(data).__name__}")
    return data


def _load(file: BinaryIO, path: str, trust: bool):
    head = file.read(32)
    zipped, legacy = head.startswith(b"PK\3\4"), _LEGACY_TORCH in head
    if zipped:
        _verify_zip(file, path, trust)
    elif not trust:
        file.seek(0)
        for _ in range(5 if legacy else 1):  # number, version, machine, content, names of storages
            check_pickle(file, path)
    file.seek(0)
    if zipped or legacy:
        return torch.load(file, map_location="cpu", weights_only=not trust)
    return (pickle.Unpickler if trust else _ArrayUnpickler)(file, encoding="latin1").load()


def _verify_zip(file: BinaryIO, path: str, trust: bool) -> None:
    """Refuse a zip from which torch's reader, which verifies nothing, would read other bytes than were written.

    Raises:
        BLPSegError: it is damaged, or not made by ``torch.save``.
    """
    comment = _verify_digest(file, path)
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            odd = [
                record.filename
                for record in records
                if record.compress_type or record.external_attr or record.flag_bits & ~_TORCH_FLAGS
            ]
            if odd or archive.comment != comment or len({record.filename for record in records}) < len(records):
                raise BLPSegError(
                    f"{path}: damaged, or not written by torch.save (zip record {odd[0] if odd else 'list'}); "
                    "restore it, or fetch it again"
                )
            broken = None if comment else archive.testzip()
            if broken:
                raise BLPSegError(f"{path}: damaged (checksum of {broken}); restore it, or fetch it again")
            if not trust:
                with archive.open(f"{records[0].filename.split('/')[0]}/data.pkl") as content:
                    check_pickle(content, path)
    except (zipfile.BadZipFile, LookupError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise BLPSegError(
            f"{path}: truncated or damaged ({describe(error)[:120]}); restore it, or fetch it again"
        ) from error


def _verify_digest(file: BinaryIO, path: str) -> bytes:
    """The comment that the zip has to have: mark and digest, which is compared; nothing in files of others."""
    length = len(DIGEST_MARK) + DIGEST_LENGTH
    size = file.seek(0, 2)
    file.seek(max(0, size - length))
    comment = file.read()
    if not comment.startswith(DIGEST_MARK):
        return b""
    digest, left = hashlib.sha256(), size - DIGEST_LENGTH
    file.seek(0)
    while left > 0:
        block = file.read(min(left, 1 << 20))
        if not block:
            break
        digest.update(block)
        left -= len(block)
    if digest.hexdigest().encode() != comment[-DIGEST_LENGTH:]:
        raise BLPSegError(f"{path}: damaged, its content has another SHA-256 than was written; restore it")
    return comment


def state_dict_of(checkpoint: object, file: str) -> dict[str, torch.Tensor]:
    """The weights in a loaded file: bare, or under ``model``, ``model_state`` or ``state_dict``; ``module.`` removed.

    Returns:
        {name: dense tensor on the CPU}; entries that hold no numbers (a version, an optimiser) are left out.

    Raises:
        BLPSegError: there are none, or one has a type that torch does not know (longdouble). ``file`` is named.
    """
    state = checkpoint
    for _ in range(3):  # e.g. {"state_dict": {"model": ...}}
        key = next((k for k in _STATE_KEYS if isinstance(state, Mapping) and k in state), None)
        if key is None or not isinstance(state, Mapping):
            break
        state = state[key]
        if not isinstance(state, Mapping):
            raise BLPSegError(f"{file}: its {key!r} is {type(state).__name__}, not a mapping of names to weights")
    if not isinstance(state, Mapping) or not state:
        raise BLPSegError(f"{file}: holds no state dict (found {type(state).__name__}); give a file of named tensors")
    tensors = {str(k): _tensor(v, str(k), file) for k, v in state.items() if _is_numeric(v)}
    if not tensors:
        raise BLPSegError(f"{file}: holds no tensors; first keys: {', '.join(map(str, list(state)[:5]))[:200]}")
    while all(k.startswith("module.") for k in tensors):
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors


def _is_numeric(value) -> bool:
    if isinstance(value, torch.Tensor):
        return (
            value.layout == torch.strided
            and value.device.type == "cpu"
            and not (value.is_quantized or value.is_complex())
        )
    return isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub"


def _tensor(value, name: str, file: str) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise BLPSegError(
            f"{file}: weight {name} is of type {value.dtype}, unknown to torch; save it as float32"
        ) from error


def check_finite(path: str, weights: Mapping) -> None:
    """Raises BLPSegError if a tensor of ``weights`` holds NaN or infinite values."""
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise BLPSegError(f"{path}: weight {name} holds NaN or infinite values; take an earlier checkpoint")
