"""Reading what others send: XML without entities, JSON, coordinates and sizes that are what they should be."""

from __future__ import annotations

import json
import math
import re
from pathlib import PurePosixPath
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from ..utils import files
from ..utils.errors import BLPSegError, describe
from ..utils.files import MOST_PIXELS

LARGEST_FILE = 1 << 28  # bytes


def read_bytes(path: str) -> bytes:
    """Raises BLPSegError for a file that is missing, unreadable or empty."""
    data = files.read_bytes(path, LARGEST_FILE)
    if not data:
        raise BLPSegError(f"{path}: the file is empty; export it again")
    return data


def check_xml(path: str, data: bytes) -> None:
    """That an XML document is well-formed, declares no entities and refers to nothing outside.

    These are the rules of defusedxml, whose own parsers build the tree in Python, at a fifth of the speed; bare expat,
    which calls nothing but what refuses, applies them in a fraction of the time.

    Raises:
        BLPSegError: it does not hold.
    """

    def refuse(*_):
        raise BLPSegError(
            f"{path}: declares XML entities, which are refused because they can exhaust memory or read other files; "
            "remove the DOCTYPE"
        )

    guard = expat.ParserCreate()
    guard.EntityDeclHandler = guard.UnparsedEntityDeclHandler = guard.ExternalEntityRefHandler = refuse
    try:
        guard.Parse(data, True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise _not_xml(path, error) from error


def parse_xml(path: str, data: bytes) -> ElementTree.Element:
    """The root of an XML document, after :func:`check_xml`: no entity is left that the C parser could expand."""
    check_xml(path, data)
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise _not_xml(path, error) from error


def _not_xml(path, error):
    return BLPSegError(f"{path}: not well-formed XML ({describe(error)}); export it again")


def parse_json(path: str, data: bytes):
    """Raises BLPSegError unless ``data`` is JSON."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise BLPSegError(f"{path}: JSON nested too deeply; export it again") from error
    except ValueError as error:
        raise BLPSegError(f"{path}: not JSON ({describe(error)}); export it again") from error


def check_size(where: str, height, width) -> tuple[int, int]:
    """(height, width) as integers; each may come as int or as text. Raises BLPSegError if no image has such sides."""
    sides = []
    for name, value in (("height", height), ("width", width)):
        text = str(value).strip()
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}(\.0*)?", text) or int(text.partition(".")[0]) == 0:
            raise BLPSegError(f"{where}: {name} {text[:40]!r} is no image side in pixels; correct the size")
        sides.append(int(text.partition(".")[0]))
    if sides[0] * sides[1] > MOST_PIXELS:
        raise BLPSegError(f"{where}: {sides[1]} x {sides[0]} pixels are more than {MOST_PIXELS}; correct the size")
    return sides[0], sides[1]


def pixel_points(where: str, rows: list, columns: list, height: int, width: int) -> np.ndarray:
    """(K, 2) int64 (row, column), clipped to the image.

    Coordinates come as numbers or as text. A pixel is the unit square right and below of its integer coordinates, so
    that fractions are dropped; what lies outside the image goes to its edge (METHOD section 8).

    Raises:
        BLPSegError: a coordinate is missing or no finite number.
    """
    try:
        points = np.array([list(map(int, rows)), list(map(int, columns))], dtype=np.int64)
        plain = all(type(v) is int or (type(v) is str and "_" not in v) for v in (*rows, *columns))
    except (ValueError, TypeError, OverflowError):
        plain = False
    if not plain:
        points = np.array([[_finite(where, v) for v in values] for values in (rows, columns)])
    limits = np.array([[height - 1], [width - 1]])
    return np.clip(np.floor(points), 0, limits).T.astype(np.int64)


def _finite(where, value) -> float:
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError
        number = float(value)
    except (ValueError, TypeError):
        shown = "missing" if value is None else f"{str(value)[:40]!r}"
        raise BLPSegError(f"{where}: coordinate {shown} is no number; correct the point") from None
    except OverflowError:  # an integer beyond float64: far outside, whatever the image
        return 1e300 if value > 0 else -1e300
    if not math.isfinite(number):
        raise BLPSegError(f"{where}: coordinate {str(value)[:40]!r} is not finite; correct the point")
    return number


def label_name(where: str, image_name: str) -> str:
    """The file name of an image's label: the image's own, whatever folders or URL it stood in, as PNG. Raises
    BLPSegError if it is no file's name."""
    stem = PurePosixPath(str(image_name).replace("\\", "/")).stem
    encoded = stem.encode("utf-8", "replace")
    if not stem or stem.startswith(".") or not stem.isprintable() or len(encoded) > 200:
        raise BLPSegError(f"{where}: image name {str(image_name)[:100]!r} gives no file name for the label; rename it")
    return stem + ".png"
