"""Folders of annotation files to folders of scribble labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.errors import BLPSegError
from ..utils.files import index_folder, read_label
from ..utils.parallel import FileReport
from ._untrusted import parse_json, read_bytes
from .batch import Picture, list_files, make_labels
from .formats import FORMATS
from .rasterize import UNANNOTATED
from .vocabulary import Vocabulary, load_vocabulary


def convert_annotations(
    format: str,
    source: str,
    output_dir: str,
    vocabulary: str | Vocabulary,
    *,
    images: str | None = None,
    width: int = 1,
    **options: Any,
) -> FileReport:
    """Make a scribble label, ``NAME.png`` of uint8 with 255 = not annotated, of every annotated image.

    Args:
        format: a key of :data:`~blpseg.scribbles.formats.FORMATS`.
        source: an annotation file, or a folder of them (not searched below it).
        output_dir: made where missing.
        vocabulary: "voc", "context", the path of a vocabulary file, or a vocabulary.
        width: of strokes in pixels; 1 is the rule of the published labels. Brush masks and colour PNG have their own.
        images: folder of the images; where given, annotations are checked against their sizes.
        **options: ``workers``, ``force`` and ``progress`` of :func:`~blpseg.scribbles.batch.make_labels`.

    Raises:
        BLPSegError: the source, the vocabulary or the output folder is unusable as a whole.
    """
    if isinstance(vocabulary, str):
        vocabulary = load_vocabulary(vocabulary)
    if images is not None and not os.path.isdir(images):
        raise BLPSegError(f"{images}: no such folder of images; correct the path")
    if images is not None and not index_folder(images):
        raise BLPSegError(f"{images}: holds no image to compare sizes with; correct the path")
    files = list_files(source, (FORMATS[format].extension,), FORMATS[format].title)
    classes = {number: name for name, number in reversed(vocabulary.ids.items())}
    draw = _Draw(format, vocabulary, images, width)
    return make_labels(files, output_dir, draw, split=FORMATS[format].pictures, classes=classes, **options)


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


def convert_label_images(source: str, output_dir: str, unannotated: int, **options: Any) -> FileReport:
    """Make scribble labels of label images in which another value than 255 means not annotated.

    Class numbers above that value move down by one, so that they are 0, 1, ... without a gap: with 0 as not annotated
    the classes 1, 2, ... become 0, 1, ...; with nnU-Net's ignore label, which is the highest, they stay. 255 stays too.

    Args:
        source: a label PNG, or a folder of them.
        output_dir, **options: as for :func:`convert_annotations`.
        unannotated: the value, 0..255.

    Raises:
        BLPSegError: the source or the output folder is unusable as a whole, or the value is none.
    """
    if not 0 <= unannotated <= UNANNOTATED:
        raise BLPSegError(f"--unannotated-value {unannotated} is not allowed; label images hold 0..{UNANNOTATED}")
    files = list_files(source, (".png",), "label images")
    return make_labels(files, output_dir, _Renumber(unannotated), **options)


def nnunet_labels(dataset: str) -> tuple[str, int]:
    """The folder of labels and the ignore label of a raw data set of nnU-Net v2 (its documentation, "ignore label").

    Raises:
        BLPSegError: ``dataset.json`` is missing or damaged, has no ignore label, or the labels are no PNG.
    """
    path = os.path.join(dataset, "dataset.json")
    content = parse_json(path, read_bytes(path))
    labels = content.get("labels") if isinstance(content, dict) else None
    ignore = labels.get("ignore") if isinstance(labels, dict) else None
    if type(ignore) is not int:
        raise BLPSegError(
            f"{path}: its labels name no ignore label, so that every pixel is annotated; nothing to convert"
        )
    if content.get("file_ending") != ".png":
        raise BLPSegError(f"{path}: its labels are {content.get('file_ending')!r} files; convert them to .png first")
    return os.path.join(dataset, "labelsTr"), ignore


@dataclass(frozen=True)
class _Renumber:
    unannotated: int

    def __call__(self, picture: Picture) -> np.ndarray:
        label = read_label(picture.path)
        renumbered = label - ((label > self.unannotated) & (label != UNANNOTATED))
        return np.where(label == self.unannotated, UNANNOTATED, renumbered).astype(np.uint8)
