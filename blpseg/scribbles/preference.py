"""Measuring label preference: the probability that a pixel is annotated, by its place in its region.

BLPSeg's premise is that annotators scribble where a region is spacious, seldom near its boundary and in thin parts.
With dense masks it can be counted: the share of a class's pixels at a distance from the boundary, or of a local
thickness, that a scribble covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..utils.errors import BLPSegError
from ..utils.files import read_label, read_label_of
from ..utils.geometry import boundary_distance, distance_bins, local_thickness
from ..utils.labels import UNANNOTATED
from ..utils.parallel import map_parallel
from ..utils.progress import progress_bar
from .simulate import simulate_scribble
from .simulate_folder import file_seed

QUANTITIES = ("distance", "thickness")
_RADII = np.array([1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128])  # pixels, about sqrt(2) apart


def bin_edges(quantity: str) -> np.ndarray:
    """Lower edges of the bins in pixels, of ``"distance"`` or ``"thickness"``; the last bin is open.

    Both are those of :mod:`blpseg.utils.geometry`; a pixel on the outermost row of its region has distance 1.
    """
    return _RADII if quantity == "distance" else 2 * _RADII


def count_annotated(scribbles: Sequence[np.ndarray], mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels, and annotated pixels, of every class by distance and thickness.

    Args:
        scribbles: K arrays (H, W) uint8, 255 = not annotated. Annotations that contradict the mask do not count.
        mask: (H, W) uint8; values of ``num_classes`` and more are ignored.

    Returns:
        (2 quantities, num_classes, bins, 1 + K) int64: all pixels, then the annotated ones of each scribble.
    """
    distance = boundary_distance(mask)
    bins = distance_bins(distance, bin_edges("distance")), local_thickness(distance, bin_edges("thickness"))
    labelled = mask < num_classes
    chosen = [labelled, *(labelled & (scribble == mask) for scribble in scribbles)]
    counts = np.zeros((len(QUANTITIES), num_classes * len(_RADII), len(chosen)), np.int64)
    for counted, of_pixel in zip(counts, bins, strict=True):
        cell = mask.astype(np.intp) * len(_RADII) + of_pixel
        for number, pixels in enumerate(chosen):
            counted[:, number] = np.bincount(cell[pixels], minlength=len(counted))
    return counts.reshape(len(QUANTITIES), num_classes, len(_RADII), -1)


@dataclass(frozen=True)
class _Count:
    num_classes: int
    ignore_label: int
    preferences: tuple[float, ...]
    width: int
    seed: int

    def __call__(self, pair: tuple[str | None, str]) -> np.ndarray:
        scribble_path, mask_path = pair
        mask = read_label(mask_path)
        mask = np.where(mask == self.ignore_label, np.uint8(UNANNOTATED), mask)
        if ((mask >= self.num_classes) & (mask != UNANNOTATED)).any():
            raise BLPSegError(f"{mask_path}: has values beyond the {self.num_classes} classes; give the right data set")
        scribbles = [] if scribble_path is None else [read_label_of(mask_path, scribble_path, mask.shape)]
        seed = file_seed(self.seed, mask_path)
        scribbles += [simulate_scribble(mask, preference=p, width=self.width, seed=seed) for p in self.preferences]
        return count_annotated(scribbles, mask, self.num_classes)


def measure(
    pairs: Sequence[tuple[str | None, str]],
    num_classes: int,
    *,
    ignore_label: int = UNANNOTATED,
    preferences: Sequence[float] = (),
    width: int = 1,
    seed: int = 0,
    workers: int | None = None,
) -> np.ndarray:
    """Sum of :func:`count_annotated` over files, the scribbles on disk (if any) first, then simulated ones.

    Args:
        pairs: (scribble path or None for all, mask path).
        num_classes, ignore_label: of the masks.
        preferences: one simulated scribble each, of :func:`simulate_scribble`.
        width, seed: of the simulated ones.
        workers: processes; all CPUs by default.

    Raises:
        BLPSegError: there is no pair, or a file is missing or wrong.
    """
    if not pairs:
        raise BLPSegError("no image has both a scribble and a dense mask; give a data set that has")
    task = _Count(num_classes, ignore_label, tuple(preferences), width, seed)
    total: np.ndarray | int = 0
    for counts in progress_bar(map_parallel(task, pairs, workers), total=len(pairs), unit=" images"):
        total = total + counts
    return np.asarray(total)


def shares(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of being annotated, and relative to that of the whole class: (..., bins, K) each, NaN where empty."""
    pixels, annotated = counts[..., :1], counts[..., 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        probability = annotated / pixels
        return probability, probability / (annotated.sum(-2, keepdims=True) / pixels.sum(-2, keepdims=True))
