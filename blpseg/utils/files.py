"""Reading images and labels, writing PNG files: the one place that knows about file formats."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import struct
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, TextIO

import cv2
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from .errors import BLPSegError, describe
from .labels import IGNORED
from .paths import open_file

LARGEST_FILE = 1 << 30  # bytes
MOST_PIXELS = 178_956_970  # beyond it Pillow, too, refuses an image as a decompression bomb
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

# Labels are written and read twice as fast without PNG's filters, which are made for photographs.
LABEL_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 3]
if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # OpenCV before 4.11 cannot choose
    LABEL_PNG += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
# No others are opened. Pillow would run Ghostscript on an EPS, whatever the file is called.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_BYTES = {"I": 4, "F": 4, "I;16": 2}  # of a pixel, where that is not the count of channels
_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, EOFError, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # EXIF tag
_SWAPS_SIDES = (5, 6, 7, 8)  # EXIF orientations with width and height exchanged

logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MOST_PIXELS is ours
# OpenCV would print a warning of its own beside the one line that we raise for an unreadable file.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)


def read_image(path: str, format: str = "RGB") -> np.ndarray:
    """Read an image as 8-bit colour, upright.

    Grey, palette, CMYK and 16-bit images are converted (16 bits: v -> v / 256, whatever range is in use),
    an alpha channel is dropped, EXIF rotation is applied. Counterpart of Detectron2's ``read_image``, which
    decodes with PIL at about twice the time.

    Args:
        path: of the file.
        format: "RGB" or "BGR", the order of the channels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        BLPSegError: the file is missing, damaged, cut short, of more than MOST_PIXELS, no PNG, JPEG, BMP, TIFF or WebP,
            or of a kind with no 8-bit meaning (32-bit float).
    """
    if format not in ("RGB", "BGR"):
        raise BLPSegError(f"INPUT.FORMAT {format!r}: images are read as 'RGB' or 'BGR'")
    data = read_bytes(path)
    if _is_cut_jpeg(data):
        raise BLPSegError(f"{path}: the JPEG file is cut short; fetch it again")
    with _open(path, io.BytesIO(data)) as header:
        _check_pixels(path, header.size)
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error as error:
            raise BLPSegError(f"{path}: {_why_unreadable(header)} ({describe(error)})") from error
        if image is None:
            raise BLPSegError(f"{path}: {_why_unreadable(header)}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image) if format == "RGB" else image


def read_label_of(image: str, path: str, size: Sequence[int], ignore_label: int = IGNORED) -> np.ndarray:
    """:func:`read_label` of the label of an image of ``size`` (H, W), with 255 also for the value ``ignore_label``.

    Raises:
        BLPSegError: as there, or the label is of another size.
    """
    label = read_label(path)
    if label.shape != tuple(size):
        raise BLPSegError(
            f"{path}: the label is {label.shape[1]} x {label.shape[0]} pixels, the image {image} "
            f"{size[1]} x {size[0]}; they must agree"
        )
    return label if ignore_label == IGNORED else np.where(label == ignore_label, np.uint8(IGNORED), label)


def read_label(path: str) -> np.ndarray:
    """Read a label map: one class number a pixel.

    Accepted are 8-bit grey images, palette images (the index is the class), 16-bit grey with values up to 255,
    and colour images whose three channels are equal. An EXIF rotation is applied as in :func:`read_image`.

    Returns:
        (H, W) uint8, the values as stored.

    Raises:
        BLPSegError: the file is missing, damaged, lossy (JPEG), has colours instead of class numbers, values above
            255, or fewer than 8 bits of grey, where readers do not agree on the value.
    """
    data = read_bytes(path)
    if _is_plain_grey_png(data):
        _check_pixels(path, struct.unpack(">II", data[16:24]))
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # twice as fast as PIL
        if array is not None and array.ndim == 2:
            return array
    with _open(path, io.BytesIO(data)) as image:
        _check_pixels(path, image.size, _BYTES.get(image.mode, len(image.getbands())))
        try:
            return _label_array(path, image)
        except _UNREADABLE as error:
            raise BLPSegError(f"{path}: damaged label image ({describe(error)})") from error


def _label_array(path: str, image: ImageFile.ImageFile) -> np.ndarray:
    if image.format in ("JPEG", "MPO"):
        raise BLPSegError(f"{path}: a JPEG does not keep class numbers; save labels as PNG")
    raw_mode = str(image.tile[0][3] if image.tile else "")
    if image.mode == "1" or ("L;2" in raw_mode or "L;4" in raw_mode):
        raise BLPSegError(
            f"{path}: grey with fewer than 8 bits a pixel, which readers scale differently; save the label as 8-bit PNG"
        )
    image.load()
    array = np.asarray(ImageOps.exif_transpose(image))
    if image.mode in ("RGB", "RGBA", "LA"):
        colour = array[..., :3] if image.mode != "LA" else array[..., :1]
        if not (colour == colour[..., :1]).all():
            raise BLPSegError(
                f"{path}: a colour image; a label holds one class number a pixel (docs/DATA.md tells how to convert)"
            )
        array = colour[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "ui":
        raise BLPSegError(f"{path}: image mode {image.mode} is no label; save class numbers as 8-bit PNG")
    if array.dtype != np.uint8:
        if array.size and (array.max() > 255 or array.min() < 0):
            raise BLPSegError(f"{path}: label values {array.min()}..{array.max()} do not fit 0..255")
        array = array.astype(np.uint8)
    return array


def index_folder(folder: str | os.PathLike, suffix: str = "") -> dict[str, str]:
    """Stem -> path of the images in a folder; names that start with a dot and other files are left out.

    Args:
        folder: where the images lie.
        suffix: where given, only images named STEM + suffix count, and those one folder below count too.

    Raises:
        BLPSegError: two images share a stem.
    """
    folders = [os.fspath(folder)]
    if suffix:
        below = (os.path.join(folder, name) for name in sorted(os.listdir(folder)))
        folders += [path for path in below if os.path.isdir(path)]
    files: dict[str, str] = {}
    for path in (os.path.join(place, name) for place in folders for name in sorted(os.listdir(place))):
        stem, extension = os.path.splitext(os.path.basename(path))
        if stem.startswith(".") or extension.lower() not in IMAGE_EXTENSIONS or not stem.endswith(suffix):
            continue
        stem = stem.removesuffix(suffix)
        if stem in files:
            raise BLPSegError(f"{path}: {os.path.basename(files[stem])} has the same stem; rename one of them")
        files[stem] = path
    return files


def image_size(path: str) -> tuple[int, int]:
    """(height, width) of an image as :func:`read_image` returns it, from its header alone. Raises BLPSegError if the
    file is missing or no image."""
    with _reading(path) as file:
        return upright_size(path, file)


def upright_size(where: str, file: IO[bytes]) -> tuple[int, int]:
    """(height, width) of the image in an open file, turned as its EXIF data say. Raises BLPSegError, which names
    ``where``, if it is none of the kinds that are read."""
    with _open(where, file) as image:
        try:
            # Asking a PNG for EXIF data decodes all of it, unless the header has told.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            turned = exif.get(_ORIENTATION, 1) in _SWAPS_SIDES
        except _UNREADABLE as error:
            raise BLPSegError(f"{where}: damaged image ({describe(error)})") from error
        width, height = image.size[::-1] if turned else image.size
        return height, width


def _open(where: str, file: IO[bytes]) -> ImageFile.ImageFile:
    """The header of an image. :class:`BLPSegError` for what is none of the kinds that are read."""
    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        reason = "not an image: PNG, JPEG, BMP, TIFF and WebP are read" if file.read(1) else "the file is empty"
        raise BLPSegError(f"{where}: {reason}") from error
    except Image.DecompressionBombError as error:
        raise BLPSegError(f"{where}: more than {MOST_PIXELS} pixels; reduce the image") from error
    except _UNREADABLE as error:
        raise BLPSegError(f"{where}: damaged image ({describe(error)})") from error


def _check_pixels(where: str, size: tuple[int, int], bytes_a_pixel: int = 1) -> None:
    if size[0] * size[1] * bytes_a_pixel > MOST_PIXELS:
        raise BLPSegError(f"{where}: {size[0]} x {size[1]} pixels are too many; reduce the image")


def write_png_atomic(path: str, array: np.ndarray, palette: np.ndarray | None = None, *, durable: bool = False) -> None:
    """Write a PNG under a temporary name in the same folder and rename it: no reader ever sees half a file.

    Args:
        path: where to; missing folders are made.
        array: (H, W) uint8 grey or indices, or (H, W, 3) uint8 RGB.
        palette: (K, 3) uint8 RGB, for (H, W) only: stored beside the indices, which stay as they are.
        durable: as in :func:`write_atomic`.

    Raises:
        BLPSegError: the array is of another kind.
    """
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise BLPSegError(
            f"{path}: cannot write {array.dtype} {array.shape} as PNG; uint8 (H, W) or (H, W, 3) expected"
        )
    if palette is not None:
        image = Image.fromarray(array)
        image.putpalette(np.asarray(palette, np.uint8).tobytes())
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = buffer.getvalue()
    else:
        settings = LABEL_PNG if array.ndim == 2 else []
        data = cv2.imencode(".png", array if array.ndim == 2 else array[..., ::-1], settings)[1].tobytes()
    write_bytes_atomic(path, data, durable=durable)


def write_atomic(path: str | os.PathLike, write: Callable[[IO[bytes]], object], *, durable: bool = True) -> None:
    """Call ``write(file)`` on a temporary binary file beside ``path``, then rename it: no reader ever sees half a file.

    Args:
        path: where to; missing folders are made.
        write: gets the open file.
        durable: wait until the disk has it, so that not even a power cut loses both the old and the new file.

    Raises:
        OSError: with the path in it; ``path`` is as it was and the temporary file is gone.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    os.makedirs(folder or ".", exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().int % 10**12}.tmp")
    try:
        with open(temporary, "wb", buffering=1 << 20) as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # never made, or the disk is gone; the first error is reported
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path}: cannot be written: {error.strerror or error}") from error
        raise
    if durable:
        _sync_folder(folder or ".")


def _sync_folder(folder: str) -> None:
    # Windows cannot open folders, some network file systems refuse; the rename itself is done.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes_atomic(path: str, data: bytes, *, durable: bool = False) -> None:
    """Write bytes as :func:`write_atomic` does, by default without waiting for the disk."""
    write_atomic(path, lambda file: file.write(data), durable=durable)


def write_json(path: str, content: object) -> None:
    """Write nested dicts and lists as JSON, see :func:`without_nan`."""
    text = json.dumps(without_nan(content), indent=2, allow_nan=False)
    write_bytes_atomic(path, f"{text}\n".encode())


def write_csv(path: str, rows: Iterable[Iterable]) -> None:
    """Write rows, the first of which are the names of the columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_bytes_atomic(path, text.getvalue().encode())


def without_nan(content):
    """A copy of nested dicts and lists for JSON: Python's numbers for NumPy's, None for NaN and infinity."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    if hasattr(content, "item"):
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content


def lock_file(path: str) -> TextIO | None:
    """Lock a file until the returned file is closed; None while another process has the lock.

    A killed process lets go of it. A file system without locks gives the file unlocked, with a warning.

    Raises:
        BLPSegError: it is a symbolic link, which could lead to a file of somebody else.
    """
    import fcntl  # which Windows lacks

    if os.path.islink(path):
        raise BLPSegError(f"{path}: is a symbolic link, through which nothing is written; remove it")
    handle = open(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
    try:
        # lockf, not flock: forked processes, such as loader workers, do not inherit it.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    except OSError as error:
        reason = error.strerror or describe(error)
        logger.warning(f"{path}: no locks on this file system ({reason}); see that only one process works here")
    return handle


def check_writable(path: str) -> None:
    """Find out before long work whether :func:`write_bytes_atomic` will be able to write ``path``, and make its folder.
    Raises OSError if not."""
    probe = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    write_bytes_atomic(probe, b"")
    os.unlink(probe)


def read_bytes(path: str, most: int = LARGEST_FILE) -> bytes:
    """The content of a file. Raises BLPSegError if it is missing, no ordinary file (a pipe or a device might never
    end), or larger than ``most`` bytes."""
    with _reading(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise BLPSegError(f"{path}: larger than {most} bytes, more than any such file needs")
    return data


@contextlib.contextmanager
def _reading(path: str) -> Iterator[IO[bytes]]:
    try:
        with open_file(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise BLPSegError(f"{path}: no such file") from error
    except OSError as error:
        raise BLPSegError(f"{path}: cannot be read ({error.strerror or describe(error)})") from error


def _is_plain_grey_png(data: bytes) -> bool:
    """8-bit grey (IHDR's depth 8, colour type 0) without an EXIF chunk."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:26] == b"\x08\x00" and b"eXIf" not in data


def _is_cut_jpeg(data: bytes) -> bool:
    # Some OpenCV builds fill the missing rest with grey and say nothing. Markers cannot occur in the coded data.
    return data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")


def _why_unreadable(image: ImageFile.ImageFile) -> str:
    try:
        image.load()
        return f"a {image.format} of mode {image.mode} has no 8-bit colours; save it as 8- or 16-bit PNG"
    except _UNREADABLE as error:
        return f"damaged image ({describe(error)})"
