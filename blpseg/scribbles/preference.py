"""Label preference, measured: how likely a pixel is to be annotated, by where in its region it lies.

BLPSeg's premise is that annotators scribble where a region is spacious, seldom near its boundary and in thin parts.
With dense masks at hand that is a count: of a class's pixels at a distance from the boundary, or of a local thickness,
the share that a scribble covers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from ..utils.errors import BLPSegError
from ..utils.files import read_label, write_bytes_atomic
from ..utils.geometry import boundary_distance, distance_bins, local_thickness
from ..utils.labels import UNANNOTATED
from ..utils.parallel import map_parallel
from .simulate import simulate_scribble
from .simulate_folder import file_seed

__all__ = ["QUANTITIES", "bin_edges", "count_annotated", "measure", "plot", "summary", "write_csv"]

QUANTITIES = ("distance", "thickness")
_RADII = np.array([1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128])  # pixels, about sqrt(2) apart
_ENOUGH = 500  # pixels of a bin, and
_ENOUGH_ANNOTATED = 10  # expected annotations in it, below which a share is noise and not drawn


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
        scribbles = [] if scribble_path is None else [read_label(scribble_path)]
        if scribbles and scribbles[0].shape != mask.shape:
            raise BLPSegError(f"{scribble_path}: not of the size of {mask_path}; prepare the data again")
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
    total = 0
    for counts in tqdm(map_parallel(task, pairs, workers), total=len(pairs), unit=" images"):
        total = total + counts
    return total


def shares(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of being annotated, and relative to that of the whole class: (..., bins, K) each, NaN where empty."""
    pixels, annotated = counts[..., :1], counts[..., 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        probability = annotated / pixels
        return probability, probability / (annotated.sum(-2, keepdims=True) / pixels.sum(-2, keepdims=True))


def write_csv(path: str, counts: np.ndarray, classes: Sequence[str], sets: Sequence[str]) -> None:
    """One row for each set of scribbles, class, quantity and bin that has pixels.

    Args:
        path: where to.
        counts: of :func:`measure`.
        classes: names.
        sets: names of the sets of scribbles.
    """
    probability, relative = shares(counts)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("scribbles class quantity from_px to_px pixels annotated probability relative".split())
    for number, name in enumerate(sets):
        for class_id, class_name in enumerate(classes):
            for kind, quantity in enumerate(QUANTITIES):
                edges = [*bin_edges(quantity).tolist(), ""]
                for index in np.flatnonzero(counts[kind, class_id, :, 0]):
                    at = kind, class_id, index
                    writer.writerow(
                        [name, class_name, quantity, edges[index], edges[index + 1], counts[at][0]]
                        + [counts[at][1 + number], f"{probability[at][number]:.6g}", f"{relative[at][number]:.4g}"]
                    )
    write_bytes_atomic(path, text.getvalue().encode())


def plot(path: str, counts: np.ndarray, classes: Sequence[str], sets: Sequence[str], title: str) -> None:
    """A panel for each class and quantity: probability of being annotated relative to the class's average.

    Bins with too few pixels for a share to mean anything are left out.

    Args:
        path: where to, PNG.
        counts, classes, sets: as for :func:`write_csv`.
        title: of the figure.
    """
    from matplotlib.figure import Figure  # slow to load, and only needed here

    _, relative = shares(counts)
    shown = [c for c in range(len(classes)) if counts[0, c, :, 0].any()]
    figure = Figure(figsize=(1.5 + 2.6 * len(shown), 6), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False, sharey=True)
    for kind, quantity in enumerate(QUANTITIES):
        edges = bin_edges(quantity)
        for axis, class_id in zip(axes[kind], shown, strict=True):
            pixels, annotated = counts[kind, class_id, :, :1], counts[kind, class_id, :, 1:]
            expected = pixels * annotated.sum(axis=0) / pixels.sum()
            enough = (pixels >= _ENOUGH) & (expected >= _ENOUGH_ANNOTATED)
            for number, name in enumerate(sets):
                kept = enough[:, number]
                style = {"color": "black", "linewidth": 2.5} if name == "on disk" else {"linewidth": 1.5}
                axis.plot(edges[kept], relative[kind, class_id, kept, number], marker="o", ms=3, label=name, **style)
            axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
            axis.set_xlim(0.9 * edges[0], 1.1 * edges[np.flatnonzero(pixels)[-1]])
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_xlabel("distance to the boundary, px" if kind == 0 else "local thickness, px")
            if kind == 0:
                axis.set_title(classes[class_id])
    for row in axes:
        row[0].set_ylabel("annotated, relative to\nthe class's average")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_bytes_atomic(path, content.getvalue())


def summary(counts: np.ndarray, classes: Sequence[str], sets: Sequence[str]) -> str:
    """A table: how often the outermost and thinnest, and the innermost and thickest, quarter of a class is annotated.

    Each figure is relative to the class as a whole. Quarters are of the class's pixels; a bin that crosses the limit
    counts by its part.
    """
    rows = []
    for number, name in enumerate(sets, 1):
        for class_id, class_name in enumerate(classes):
            if not counts[0, class_id, :, 0].any():
                continue
            row = [name, class_name, f"{counts[0, class_id, :, number].sum() / counts[0, class_id, :, 0].sum():.2%}"]
            for kind in range(len(QUANTITIES)):
                pixels, annotated = counts[kind, class_id, :, 0], counts[kind, class_id, :, number]
                for ends in (slice(None), slice(None, None, -1)):
                    pixel_sum, annotated_sum = (
                        np.append(0, pixels[ends].cumsum()),
                        np.append(0, annotated[ends].cumsum()),
                    )
                    share = np.interp(0.25 * pixel_sum[-1], pixel_sum, annotated_sum) / max(1, annotated_sum[-1])
                    row.append(f"{share / 0.25:.2f}")
            rows.append(row)
    headers = ["scribbles", "class", "annotated", "outermost 1/4", "innermost 1/4", "thinnest 1/4", "thickest 1/4"]
    return tabulate(rows, headers, disable_numparse=True, colalign=["left"] * 2 + ["right"] * 5)
