"""Folders of annotation files to folders of scribble labels: in parallel, resumable, one bad file at a time."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import struct
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ...errors import BLPSegError, debug_enabled, describe
from ..io import write_bytes_atomic
from ._untrusted import label_name, read_bytes
from .formats import FORMATS
from .vocabulary import Vocabulary, load_vocabulary

__all__ = ["ConversionReport", "convert_annotations", "convert_xml_folder", "default_workers", "map_parallel"]

_RULE = b"2"  # raise it when the same input would give other pixels: labels made before are then made again
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_AFTER_HEADER = 33  # bytes of a PNG's signature and IHDR chunk
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_BATCH = 16  # files a worker takes at once


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


def default_workers() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def convert_xml_folder(
    xml_dir: str, output_dir: str, vocabulary: str | Vocabulary, workers: int | None = None, progress: bool = False
) -> ConversionReport:
    """PASCAL-Scribble XML files to labels: :func:`convert_annotations` of format "xml"."""
    return convert_annotations("xml", xml_dir, output_dir, vocabulary, workers=workers, progress=progress)


def convert_annotations(
    format: str,
    source: str,
    output_dir: str,
    vocabulary: str | Vocabulary,
    *,
    images: str | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> ConversionReport:
    """Make a scribble label, ``NAME.png`` of uint8 with 255 = not annotated, of every annotated image.

    A label carries a digest of what it was made from, so that a second run makes only what has changed. Each is written
    under a temporary name and renamed. A bad file does not stop the others.

    Args:
        format: a key of :data:`~blpseg.data.scribbles.formats.FORMATS`.
        source: an annotation file, or a folder of them (not searched below it).
        output_dir: made where missing.
        vocabulary: "voc", "context", the path of a vocabulary file, or a vocabulary.
        images: folder of the images; where given, annotations are checked against their sizes.
        workers: processes; all CPUs by default, 1 works in this process.
        force: make labels again that are up to date.
        progress: show a bar, and the failures as they come, on stderr.

    Raises:
        BLPSegError: the source, the vocabulary or the output folder is unusable as a whole.
    """
    if isinstance(vocabulary, str):
        vocabulary = load_vocabulary(vocabulary)
    for folder, what in ((source, "source"), (images, "folder of the images")):
        if folder is not None and not PathManager.exists(folder):
            raise BLPSegError(f"{folder}: no such {what}; correct the path")
    files = _source_files(format, source)
    if PathManager.isfile(output_dir):
        raise BLPSegError(f"{output_dir}: is a file; --output names a folder")
    PathManager.mkdirs(output_dir)
    if os.path.realpath(output_dir) == os.path.realpath(os.path.dirname(files[0])):
        raise BLPSegError(f"{output_dir}: holds the annotations themselves; choose another folder for the labels")

    report = ConversionReport()
    task = _Task(format, output_dir, vocabulary, images, force)
    total = len(files) if FORMATS[format].pictures is None else None
    with tqdm(total=total, unit=" labels", disable=not progress, file=sys.stderr, mininterval=0.5) as bar:
        for outcome in map_parallel(task, _pictures(format, files), workers or default_workers()):
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


def _source_files(format: str, source: str) -> list[str]:
    if PathManager.isfile(source):
        return [source]
    extension = FORMATS[format].extension
    names = sorted(name for name in PathManager.ls(source) if name.lower().endswith(extension))
    files = [path for path in (os.path.join(source, name) for name in names) if not PathManager.isdir(path)]
    if not files:
        raise BLPSegError(f"{source}: no {extension} file in it ({FORMATS[format].title} expected); correct the path")
    return files


@dataclass(frozen=True)
class _Picture:
    path: str  # of the annotation file
    label: str  # file name
    part: object = None
    failure: str | None = None  # why there is nothing to draw


def _pictures(format: str, files: list[str]) -> Iterator[_Picture]:
    """Every picture of every file. Two that would write the same label are a failure of the later one."""
    taken: dict[str, str] = {}
    for path in files:
        try:
            split = FORMATS[format].pictures
            pictures = split(path) if split else [(os.path.basename(path), None)]
        except Exception as error:  # the other files are still done
            yield _Picture(path, "", failure=_failure(path, error))
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
                yield _Picture(path, "", failure=_failure(path, error))
                continue
            taken[label.lower()] = path
            yield _Picture(path, label, part)


@dataclass(frozen=True)
class _Task:
    """What a worker does with a picture: True for a label written, False for up to date, a line for a failure."""

    format: str
    output_dir: str
    vocabulary: Vocabulary
    images: str | None
    force: bool

    def __call__(self, picture: _Picture) -> bool | str:
        if picture.failure is not None:
            return picture.failure
        target = os.path.join(self.output_dir, picture.label)
        try:
            content = read_bytes(picture.path) if picture.part is None else _bytes(picture.part)
            stamp = _stamp(_RULE, self.format.encode(), _bytes(self.vocabulary), content)
            if not self.force and _carries(target, stamp):
                return False
            label = FORMATS[self.format].draw(picture.path, picture.part, self.vocabulary, self.images)
            write_bytes_atomic(target, _png(label, stamp))
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
        with PathManager.open(path, "rb") as file:
            head = file.read(_AFTER_HEADER + len(stamp))
            file.seek(-len(_PNG_END), os.SEEK_END)
            return head[_AFTER_HEADER:] == stamp and file.read() == _PNG_END
    except OSError:  # not there, or too short to seek in
        return False


def map_parallel(function: Callable, items: Iterable, workers: int) -> Iterator:
    """``function`` of every item, in processes, as results come (in no set order).

    Args:
        function: picklable.
        items: taken only as fast as workers get through them.
        workers: 1 works in this process.

    Raises:
        BLPSegError: a worker died.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # A forked worker has the packages loaded; a spawned one would load PyTorch for seconds first.
    method = "fork" if sys.platform == "linux" else None
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=_ignore_interrupt)
    items = iter(items)
    running = set()
    try:
        with warnings.catch_warnings():
            # Workers use none of the threads that Python 3.12 warns of when it forks.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            while batch := list(islice(items, _BATCH)):
                running.add(pool.submit(_run_batch, function, batch))
                if len(running) > 2 * workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield from future.result()
        for future in as_completed(running):
            yield from future.result()
    except BrokenProcessPool as error:
        raise BLPSegError(
            "a worker process was killed, perhaps for want of memory; what is done is kept: run again with --workers 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run_batch(function, batch):
    return [function(item) for item in batch]


def _ignore_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
