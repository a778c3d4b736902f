"""Labels that are made from other files: made again when those change, never written over what somebody drew.

Each carries a digest of what it was made from. A label whose digest is the right one is up to date; a file without a
digest was made by somebody else and stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping

import numpy as np

from . import paths
from .errors import BLPSegError
from .files import write_bytes_atomic

__all__ = ["classes_of", "is_up_to_date", "stamp", "write_label"]

_RULE = b"2"  # raise it when the same input would give other pixels: labels made before are then made again
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_AFTER_HEADER = 33  # bytes of a PNG's signature and IHDR chunk
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_KEY = b"tEXtblpseg-source\0"
_CLASSES = b"tEXtblpseg-classes\0"
_LONGEST_CLASSES = 1 << 16  # bytes


def stamp(*sources: bytes | str) -> bytes:
    """The digest of what a label is made from, as the PNG chunk that carries it.

    Args:
        *sources: a file's content, or text that says what else the label depends on.
    """
    digest = hashlib.sha256()
    for source in (_RULE, *sources):
        part = source if isinstance(source, bytes) else source.encode("utf-8", "replace")
        digest.update(len(part).to_bytes(8, "big") + part)
    return _chunk(_KEY + digest.hexdigest().encode())


def is_up_to_date(path: str, stamp: bytes) -> bool:
    """Whether a label is there, whole, and made from the same."""
    try:
        with paths.open_file(path, "rb") as file:
            head = file.read(_AFTER_HEADER + len(stamp))
            file.seek(-len(_PNG_END), os.SEEK_END)
            return head[_AFTER_HEADER:] == stamp and file.read() == _PNG_END
    except OSError:  # not there, or too short to seek in
        return False


def write_label(
    path: str,
    label: np.ndarray,
    stamp: bytes,
    *,
    classes: Mapping[int, str] | None = None,
    force: bool = False,
    durable: bool = False,
) -> None:
    """Write a label in one step as a grey 8-bit PNG that carries its stamp.

    Args:
        path: its folder is made where missing.
        label: (H, W) uint8.
        stamp: of :func:`stamp`.
        classes: what the numbers mean, where the source has names; stored beside the pixels for :func:`classes_of`.
        force: replace a file that was not made here.
        durable: see :func:`blpseg.utils.files.write_bytes_atomic`.

    Raises:
        BLPSegError: there is such a file.
    """
    if not force and paths.isfile(path) and not _made_here(path):
        raise BLPSegError(f"{path}: not made by this command and left as it is; --force replaces it")
    height, width = label.shape
    rows = np.zeros((height, 1 + width), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = label
    # Run lengths suit scribbles: a quarter of OpenCV's time, and smaller files.
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    header = _chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    names = _chunk(_CLASSES + json.dumps(dict(classes)).encode()) if classes else b""
    pixels = _chunk(b"IDAT" + deflate.compress(rows.data) + deflate.flush())
    write_bytes_atomic(path, _SIGNATURE + header + stamp + names + pixels + _PNG_END, durable=durable)


def classes_of(path: str) -> dict[int, str]:
    """What the numbers of a label meant to the vocabulary that it was made with; {} where it does not say."""
    with paths.open_file(path, "rb") as file:
        head = file.read(_LONGEST_CLASSES)
    at = head.find(_CLASSES)
    if at < 4:
        return {}
    (size,) = struct.unpack(">I", head[at - 4 : at])
    try:
        names = json.loads(head[at + len(_CLASSES) : at + 4 + size])
        return {int(number): str(name) for number, name in names.items()}
    except (ValueError, AttributeError):
        return {}


def _made_here(path: str) -> bool:
    with paths.open_file(path, "rb") as file:
        head = file.read(_AFTER_HEADER + 4 + len(_KEY))
    return not head or head.endswith(_KEY)  # an empty file is worth nothing to anybody


def _chunk(content: bytes) -> bytes:
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
