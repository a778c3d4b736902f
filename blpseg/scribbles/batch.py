"""Making a folder of labels from a folder of anything: in parallel, resumable, one bad file at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..utils.errors import BLPSegError
from ..utils.made import is_up_to_date, stamp, write_label
from ..utils.parallel import FileReport, file_error, process_files
from ._untrusted import label_name, read_bytes


@dataclass(frozen=True)
class Picture:
    """What one label is made from: a source file, or ``part`` of it, plain data. ``label`` is the label's file name,
    ``failure`` says why there is nothing to make."""

    path: str
    label: str = ""
    part: object = None
    failure: BLPSegError | None = None


def list_files(source: str, extensions: tuple[str, ...], title: str) -> list[str]:
    """A file itself, or the files with these extensions that lie in a folder (not below it), sorted. Raises BLPSegError
    if there are none."""
    if not os.path.exists(source):
        raise BLPSegError(f"{source}: no such file or folder; correct the path")
    if os.path.isfile(source):
        return [source]
    names = sorted(name for name in os.listdir(source) if name.lower().endswith(extensions))
    files = [path for path in (os.path.join(source, name) for name in names) if not os.path.isdir(path)]
    if not files:
        raise BLPSegError(f"{source}: no {' or '.join(extensions)} file in it ({title} expected); correct the path")
    return files


def make_labels(
    files: list[str],
    output_dir: str,
    draw: Callable[[Picture], np.ndarray],
    *,
    split: Callable[[str], list[tuple[str, object]]] | None = None,
    classes: Mapping[int, str] | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> FileReport:
    """Make a label, ``NAME.png`` (uint8, grey), of every picture in the files.

    A label carries a digest of the bytes of its source and of ``repr(draw)``; one that carries the right digest is
    left alone, and so is a file of that name that was not made here. What is wrong with one picture does not stop the
    others.

    Args:
        files: at least one.
        output_dir: made where missing.
        draw: picture -> (H, W) uint8. Picklable; its repr tells all that the result depends on beside the source.
        split: path -> (image name, part) of the pictures in a file; None where a file is one picture of its own name.
        classes: what the numbers mean, where the files have names; the labels carry it.
        workers: processes; all CPUs by default, 1 works in this process.
        force: make labels again that are up to date, and replace files that were not made here.
        progress: show a bar, and the failures as they come, on stderr.

    Raises:
        BLPSegError: the output folder is unusable.
    """
    if os.path.isfile(output_dir):
        raise BLPSegError(f"{output_dir}: is a file; the output is a folder")
    os.makedirs(output_dir, exist_ok=True)
    if os.path.realpath(output_dir) == os.path.realpath(os.path.dirname(files[0])):
        raise BLPSegError(f"{output_dir}: holds the source files themselves; choose another folder for the labels")
    total = len(files) if split is None else None
    pictures = _pictures(files, split)
    return process_files(
        _Task(draw, output_dir, force, classes), pictures, workers, "labels", total=total, progress=progress
    )


def _pictures(files, split) -> Iterator[Picture]:
    """Every picture of every file. Two that would write the same label are a failure of the later one."""
    taken: dict[str, str] = {}
    for path in files:
        try:
            pictures = split(path) if split else [(os.path.basename(path), None)]
        except Exception as error:  # the other files are still done
            yield Picture(path, failure=file_error(path, error))
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
                yield Picture(path, failure=error)
                continue
            taken[label.lower()] = path
            yield Picture(path, label, part)


@dataclass(frozen=True)
class _Task:
    """What a worker does with a picture: True for a label written, False for up to date."""

    draw: Callable[[Picture], np.ndarray]
    output_dir: str
    force: bool
    classes: Mapping[int, str] | None

    def __call__(self, picture: Picture) -> bool:
        if picture.failure is not None:
            raise picture.failure
        target = os.path.join(self.output_dir, picture.label)
        source = read_bytes(picture.path) if picture.part is None else repr(picture.part)
        made_from = stamp(repr(self.draw), source)
        if not self.force and is_up_to_date(target, made_from):
            return False
        write_label(target, self.draw(picture), made_from, classes=self.classes, force=self.force)
        return True
