"""A folder of dense masks to a folder of simulated scribbles."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.errors import BLPSegError
from ..utils.files import read_label
from ..utils.labels import UNANNOTATED
from ..utils.parallel import FileReport
from .batch import Picture, list_files, make_labels
from .simulate import simulate_scribble

_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")


def file_seed(seed: int, path: str) -> int:
    """The seed of a file, from the common one and the file's name: neither order nor workers change a scribble."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return int.from_bytes(hashlib.sha256(f"{seed}/{stem}".encode("utf-8", "replace")).digest()[:8], "big")


def simulate_folder(
    masks: str,
    output_dir: str,
    *,
    preference: float = 0.5,
    length: float = 1.0,
    width: int = 3,
    seed: int = 0,
    ignore_label: int = UNANNOTATED,
    **options: Any,
) -> FileReport:
    """Simulate a scribble for every mask: :func:`simulate_scribble`, each with :func:`file_seed`.

    Args:
        masks: a mask, or a folder of them (not searched below it), as ``read_label`` reads them.
        output_dir: made where missing; ``NAME.png`` of each mask.
        preference, length, width, ignore_label: as there.
        seed: common to all files.
        **options: ``workers``, ``force`` and ``progress`` of :func:`~blpseg.scribbles.batch.make_labels`.

    Raises:
        BLPSegError: the masks or the output folder are unusable as a whole.
    """
    files = list_files(masks, _EXTENSIONS, "masks")
    draw = _Draw(preference, length, width, seed, ignore_label)
    return make_labels(files, output_dir, draw, **options)


@dataclass(frozen=True)
class _Draw:
    preference: float
    length: float
    width: int
    seed: int
    ignore_label: int

    def __call__(self, picture: Picture) -> np.ndarray:
        mask = read_label(picture.path)
        if self.ignore_label != UNANNOTATED and (mask == UNANNOTATED).any():
            raise BLPSegError(
                f"{picture.path}: has 255 beside the ignore value {self.ignore_label}; is --ignore-label right?"
            )
        return simulate_scribble(
            mask,
            preference=self.preference,
            length=self.length,
            width=self.width,
            seed=file_seed(self.seed, picture.path),
            ignore_label=self.ignore_label,
        )
