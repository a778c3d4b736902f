"""Folders of annotation files to folders of scribble labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..utils import paths
from ..utils.errors import BLPSegError
from ..utils.parallel import FileReport
from .batch import Picture, list_files, make_labels
from .formats import FORMATS
from .vocabulary import Vocabulary, load_vocabulary

__all__ = ["convert_annotations", "convert_xml_folder"]


def convert_xml_folder(
    xml_dir: str, output_dir: str, vocabulary: str | Vocabulary, workers: int | None = None, progress: bool = False
) -> FileReport:
    """PASCAL-Scribble XML files to labels: :func:`convert_annotations` of format "xml"."""
    return convert_annotations("xml", xml_dir, output_dir, vocabulary, workers=workers, progress=progress)


def convert_annotations(
    format: str,
    source: str,
    output_dir: str,
    vocabulary: str | Vocabulary,
    *,
    images: str | None = None,
    width: int = 1,
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> FileReport:
    """Make a scribble label, ``NAME.png`` of uint8 with 255 = not annotated, of every annotated image.

    A label carries a digest of what it was made from, so that a second run makes only what has changed. Each is written
    under a temporary name and renamed. A bad file does not stop the others.

    Args:
        format: a key of :data:`~blpseg.scribbles.formats.FORMATS`.
        source: an annotation file, or a folder of them (not searched below it).
        output_dir: made where missing.
        vocabulary: "voc", "context", the path of a vocabulary file, or a vocabulary.
        width: of strokes in pixels; 1 is the rule of the published labels. Brush masks and colour PNG have their own.
        images: folder of the images; where given, annotations are checked against their sizes.
        workers: processes; all CPUs by default, 1 works in this process.
        force: make labels again that are up to date.
        progress: show a bar, and the failures as they come, on stderr.

    Raises:
        BLPSegError: the source, the vocabulary or the output folder is unusable as a whole.
    """
    if isinstance(vocabulary, str):
        vocabulary = load_vocabulary(vocabulary)
    if images is not None and not paths.isdir(images):
        raise BLPSegError(f"{images}: no such folder of images; correct the path")
    files = list_files(source, (FORMATS[format].extension,), FORMATS[format].title)
    return make_labels(
        files,
        output_dir,
        _Draw(format, vocabulary, images, width),
        split=FORMATS[format].pictures,
        classes={number: name for name, number in reversed(vocabulary.ids.items())},
        workers=workers,
        force=force,
        progress=progress,
    )


@dataclass(frozen=True)
class _Draw:
    format: str
    vocabulary: Vocabulary
    images: str | None  # checks, but does not change a label
    width: int

    def __repr__(self) -> str:
        # Labels made before there was a width stay up to date.
        width = f", width={self.width}" if self.width != 1 else ""
        return f"_Draw(format={self.format!r}, vocabulary={self.vocabulary!r}{width})"

    def __call__(self, picture: Picture) -> np.ndarray:
        return FORMATS[self.format].draw(picture.path, picture.part, self.vocabulary, self.images, self.width)
