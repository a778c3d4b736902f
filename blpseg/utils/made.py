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

import cv2
import numpy as np
from PIL import Image

from .errors import BLPSegError
from .files import LABEL_PNG, write_bytes_atomic
from .paths import open_file

_RULE = b"2"  # raise it when the same input would give other pixels: labels made before are then made again
_AFTER_HEADER = 33  # bytes of a PNG's signature and IHDR chunk
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_KEY = b"tEXtblpseg-source\0"
_CLASSES = b"tEXtblpseg-classes\0"
# They suit scribbles: half of the time that the default takes, and smaller files.
_RUN_LENGTHS = [*LABEL_PNG, cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]


def stamp(*sources: bytes | str) -> bytes:
    """The digest of what a label is made from, as the PNG chunk that carries it. Sources are a file's content, and text
    that says what else the label depends on."""
    digest = hashlib.sha256()
    for source in (_RULE, *sources):
        part = source if isinstance(source, bytes) else source.encode("utf-8", "replace")
        digest.update(len(part).to_bytes(8, "big") + part)
    return _chunk(_KEY + digest.hexdigest().encode())


def is_up_to_date(path: str, stamp: bytes) -> bool:
    """Whether a label is there, whole, and made from the same."""
    try:
        with open_file(path, "rb") as file:
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
    """Write a label, (H, W) uint8, in one step as a grey PNG that carries its :func:`stamp`; missing folders are made.

    ``classes`` says what the numbers mean, where the source has names, and is stored for :func:`classes_of`. ``force``
    replaces a file that was not made here. ``durable``: see :func:`blpseg.utils.files.write_atomic`.

    Raises:
        BLPSegError: there is such a file, and no ``force``.
    """
    if not force and os.path.isfile(path) and not _made_here(path):
        raise BLPSegError(f"{path}: not made by this command and left as it is; --force replaces it")
    names = _chunk(_CLASSES + json.dumps(dict(classes)).encode()) if classes else b""
    png = cv2.imencode(".png", label, _RUN_LENGTHS)[1].tobytes()
    write_bytes_atomic(path, png[:_AFTER_HEADER] + stamp + names + png[_AFTER_HEADER:], durable=durable)


def classes_of(path: str) -> dict[int, str]:
    """What the numbers of a label meant to the vocabulary that it was made with; {} where it does not say."""
    try:
        with open_file(path, "rb") as file, Image.open(file, formats=("PNG",)) as image:
            names = json.loads(image.info["blpseg-classes"])
        return {int(number): str(name) for number, name in names.items()}
    except (OSError, SyntaxError, ValueError, KeyError, AttributeError):
        return {}


def _made_here(path: str) -> bool:
    with open_file(path, "rb") as file:
        head = file.read(_AFTER_HEADER + 4 + len(_KEY))
    return not head or head.endswith(_KEY)  # an empty file is worth nothing to anybody


def _chunk(content: bytes) -> bytes:
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
