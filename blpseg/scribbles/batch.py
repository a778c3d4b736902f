"""Making a folder of labels from a folder of anything: in parallel, resumable, one bad file at a time."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from ..utils import paths
from ..utils.errors import BLPSegError, debug_enabled, describe
from ..utils.files import write_bytes_atomic
from ..utils.parallel import default_workers, map_parallel
from ._untrusted import label_name, read_bytes

__all__ = ["ConversionReport", "Picture", "list_files", "make_labels"]

_RULE = b"2"  # raise it when the same input would give other pixels: labels made before are then made again
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_AFTER_HEADER = 33  # bytes of a PNG's signature and IHDR chunk
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"


@dataclass
class ConversionReport:
    """What became of every picture.

    Attributes:
        written, up_to_date: how many labels were written, or were there already and still right.
        failed: one line for each file or picture that could not be converted.
    """

    written: int = 0
    up_to_date: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.written + self.up_to_date + len(self.failed)


@dataclass(frozen=True)
class Picture:
    """What one label is made from.

    Attributes:
        path: of the source file.
        label: file name of the label.
        part: what the label is made from, where that is not the whole file: plain data.
        failure: why there is nothing to make.
    """

    path: str
    label: str = ""
    part: object = None
    failure: str | None = None


def list_files(source: str, extensions: tuple[str, ...], title: str) -> list[str]:
    """A file itself, or the files with the given extensions that lie in a folder (not below it), sorted.

    Raises:
        BLPSegError: there are none.
    """
    if not paths.exists(source):
        raise BLPSegError(f"{source}: no such file or folder; correct the path")
    if paths.isfile(source):
        return [source]
    names = sorted(name for name in paths.listdir(source) if name.lower().endswith(extensions))
    files = [path for path in (os.path.join(source, name) for name in names) if not paths.isdir(path)]
    if not files:
        raise BLPSegError(f"{source}: no {' or '.join(extensions)} file in it ({title} expected); correct the path")
    return files


def make_labels(
    files: list[str],
    output_dir: str,
    draw: Callable[[Picture], np.ndarray],
    *,
    split: Callable[[str], list[tuple[str, object]]] | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> ConversionReport:
    """Make a label, ``NAME.png`` (uint8, grey), of every picture in the files.

    A label carries a digest of what it was made from: the bytes of its source, and ``repr(draw)``. A label that is
    whole and carries the right one is left alone. Each is written under a temporary name and renamed. What is wrong
    with one picture does not stop the others.

    Args:
        files: at least one.
        output_dir: made where missing.
        draw: picture -> (H, W) uint8. Picklable; its repr tells all that the result depends on beside the source.
        split: path -> (image name, part) of the pictures in a file; None where a file is one picture of its own name.
        workers: processes; all CPUs by default, 1 works in this process.
        force: make labels again that are up to date.
        progress: show a bar, and the failures as they come, on stderr.

    Raises:
        BLPSegError: the output folder is unusable.
    """
    if paths.isfile(output_dir):
        raise BLPSegError(f"{output_dir}: is a file; the output is a folder")
    paths.makedirs(output_dir)
    if os.path.realpath(output_dir) == os.path.realpath(os.path.dirname(files[0])):
        raise BLPSegError(f"{output_dir}: holds the source files themselves; choose another folder for the labels")

    report = ConversionReport()
    task = _Task(draw, output_dir, force)
    total = len(files) if split is None else None
    with tqdm(total=total, unit=" labels", disable=not progress, file=sys.stderr, mininterval=0.5) as bar:
        for outcome in map_parallel(task, _pictures(files, split), workers or default_workers()):
            bar.update()
            if outcome is True:
                report.written += 1
            elif outcome is False:
                report.up_to_date += 1
            else:
                report.failed.append(outcome)
                if progress:
                    bar.write(f"error: {outcome}", file=sys.stderr)
    return report


def _pictures(files, split) -> Iterator[Picture]:
    """Every picture of every file. Two that would write the same label are a failure of the later one."""
    taken: dict[str, str] = {}
    for path in files:
        try:
            pictures = split(path) if split else [(os.path.basename(path), None)]
        except Exception as error:  # the other files are still done
            yield Picture(path, "", failure=_failure(path, error))
            continue
        for image_name, part in pictures:
            try:
                label = label_name(path, image_name)
                if label.lower() in taken:  # some file systems take upper and lower case for the same
                    raise BLPSegError(
                        f"{path}: label {label!r} of {image_name[:100]!r} is that of {taken[label.lower()]} already; "
                        "give the images different names"
                    )
            except BLPSegError as error:
                yield Picture(path, "", failure=_failure(path, error))
                continue
            taken[label.lower()] = path
            yield Picture(path, label, part)


@dataclass(frozen=True)
class _Task:
    """What a worker does with a picture: True for a label written, False for up to date, a line for a failure."""

    draw: Callable[[Picture], np.ndarray]
    output_dir: str
    force: bool

    def __call__(self, picture: Picture) -> bool | str:
        if picture.failure is not None:
            return picture.failure
        target = os.path.join(self.output_dir, picture.label)
        try:
            content = read_bytes(picture.path) if picture.part is None else _bytes(picture.part)
            stamp = _stamp(_RULE, _bytes(self.draw), content)
            if not self.force and _carries(target, stamp):
                return False
            write_bytes_atomic(target, _png(self.draw(picture), stamp))
            return True
        except Exception as error:  # the other pictures are still done
            return _failure(picture.path, error)


def _failure(path: str, error: Exception) -> str:
    """One line that names the file."""
    if isinstance(error, BLPSegError):
        return describe(error)
    if debug_enabled():
        traceback.print_exception(error)
    if isinstance(error, OSError):
        return f"{path}: {describe(error)}"
    if isinstance(error, MemoryError):
        return f"{path}: out of memory; convert it with --workers 1"
    return f"{path}: unexpected {type(error).__name__}: {describe(error)} (--debug shows where)"


def _png(label: np.ndarray, stamp: bytes) -> bytes:
    """A grey 8-bit PNG. Run lengths suit scribbles: a quarter of OpenCV's time, and smaller files."""
    height, width = label.shape
    rows = np.zeros((height, 1 + width), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = label
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return _SIGNATURE + header + stamp + _chunk(b"IDAT", deflate.compress(rows) + deflate.flush()) + _PNG_END


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _bytes(value) -> bytes:
    return repr(value).encode("utf-8", "replace")


def _stamp(*content: bytes) -> bytes:
    """A PNG text chunk with the digest of what a label is made from."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(len(part).to_bytes(8, "big") + part)
    return _chunk(b"tEXt", b"blpseg-source\0" + digest.hexdigest().encode())


def _carries(path: str, stamp: bytes) -> bool:
    """Whether a label is there, whole, and made from the same."""
    try:
        with paths.open_file(path, "rb") as file:
            head = file.read(_AFTER_HEADER + len(stamp))
            file.seek(-len(_PNG_END), os.SEEK_END)
            return head[_AFTER_HEADER:] == stamp and file.read() == _PNG_END
    except OSError:  # not there, or too short to seek in
        return False
