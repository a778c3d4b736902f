"""Strokes to label images, by the rule that the published PASCAL-Scribble labels were drawn with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = ["UNANNOTATED", "rasterize_strokes", "trace_stroke"]

UNANNOTATED = 255  # on disk, METHOD section 8
_MAX_PIXELS_AT_ONCE = 1 << 22  # bounds the memory that a hostile zigzag of a million corners can ask for


def rasterize_strokes(
    strokes: Iterable[tuple[int, np.ndarray]], height: int, width: int, background: int = UNANNOTATED
) -> np.ndarray:
    """Draw open strokes, in order, later over earlier (METHOD section 8).

    Args:
        strokes: pairs of a class id (0..255) and (K, 2) integer points as (row, column), K >= 1. Points outside
            the image are clipped to it. A stroke of one point sets one pixel (the published converter drops it).
        height, width: size of the image in pixels.
        background: value of pixels that no stroke touches.

    Returns:
        (height, width) uint8.

    Raises:
        ValueError: if a stroke is not a non-empty (K, 2) array or a class id does not fit uint8.
    """
    label = np.full((height, width), background, dtype=np.uint8)
    flat = label.reshape(-1)
    limits = np.array([height - 1, width - 1])
    for class_id, points in strokes:
        points = np.asarray(points)
        if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0 or points.dtype.kind not in "iu":
            raise ValueError(f"a stroke is a (K, 2) integer array with K >= 1, not {points.shape} {points.dtype}")
        if not 0 <= class_id <= 255:
            raise ValueError(f"class id {class_id} is not within 0..255")
        points = np.clip(points.astype(np.int64), 0, limits)
        for rows, columns in trace_stroke(points):
            flat[rows * width + columns] = class_id
    return label


def trace_stroke(points: np.ndarray):
    """The pixels of one open stroke, end points included, as (rows, columns) chunks in drawing order.

    Between neighbouring points m = max(|dr|, |dc|) pixels are set at trunc(r + i * (dr / m)). The quotient is rounded
    to float64 before it is multiplied, as the published converter does: where m is 44 or more, exact arithmetic would
    put a pixel in a few hundred elsewhere than the published labels have it.

    Args:
        points: (K, 2) int64 (row, column), non-negative, K >= 1.
    """
    start, delta = points[:-1], np.diff(points, axis=0)
    count = np.maximum(np.abs(delta).max(axis=1, initial=0), 1)  # m <= 1: the first end point alone
    slope = delta / count[:, None]
    ends = np.cumsum(count)
    first = 0
    while first < len(start):
        drawn = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, drawn + _MAX_PIXELS_AT_ONCE, side="right")))
        part = slice(first, last)
        step = np.arange(ends[last - 1] - drawn) - np.repeat(ends[part] - count[part] - drawn, count[part])
        pixels = np.repeat(slope[part], count[part], axis=0) * step[:, None]
        pixels += np.repeat(start[part], count[part], axis=0)
        pixels = pixels.astype(np.int64)  # truncates; never negative
        yield pixels[:, 0], pixels[:, 1]
        first = last
    yield points[-1:, 0], points[-1:, 1]
