"""Strokes to label images, by the rule that the published PASCAL-Scribble labels were drawn with."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from ..utils.labels import UNANNOTATED

_MOST_PIXELS = 1 << 26  # of all strokes of an image: a hostile zigzag sets thousands of times as many
_MAX_PIXELS_AT_ONCE = 1 << 22  # bounds the memory that a hostile zigzag of a million corners can ask for


def rasterize_strokes(
    strokes: Iterable[tuple[int, np.ndarray] | tuple[int, np.ndarray, int]],
    height: int,
    width: int,
    background: int = UNANNOTATED,
) -> np.ndarray:
    """Draw open strokes, in order, later over earlier (METHOD section 8).

    Args:
        strokes: pairs of a class id (0..255) and (K, 2) integer points as (row, column), K >= 1. Points outside
            the image are clipped to it. A stroke of one point sets one pixel (the published converter drops it).
            A third element is the width in pixels, 1 (the published rule) where it is left out: every pixel of the
            rule is then the centre of a round brush, OpenCV's ellipse, as in :func:`simulate_scribble`.
        height, width: size of the image in pixels.
        background: value of pixels that no stroke touches.

    Returns:
        (height, width) uint8.

    Raises:
        ValueError: if a stroke is not a non-empty (K, 2) array, a class id does not fit uint8, a width is below 1, or
            the strokes are longer than any that people draw.
    """
    label = np.full((height, width), background, dtype=np.uint8)
    waiting: list[tuple[int, np.ndarray]] = []  # strokes one pixel wide, which are drawn all at once
    for class_id, points, *brush in strokes:
        points = np.asarray(points)
        if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0 or points.dtype.kind not in "iu":
            raise ValueError(f"a stroke is a (K, 2) integer array with K >= 1, not {points.shape} {points.dtype}")
        if not 0 <= class_id <= 255:
            raise ValueError(f"class id {class_id} is not within 0..255")
        if brush and brush[0] < 1:
            raise ValueError(f"a stroke is 1 pixel wide or more, not {brush[0]}")
        if brush and brush[0] > 1:
            _draw_thin(label, waiting)
            waiting = []
            _draw_wide(label, class_id, points, int(brush[0]))
        else:
            waiting.append((class_id, points))
    _draw_thin(label, waiting)
    return label


def _draw_wide(label: np.ndarray, class_id: int, points: np.ndarray, width: int) -> None:
    points = np.minimum(np.maximum(points, 0), np.subtract(label.shape, 1))
    (top, left), (bottom, right) = np.maximum(points.min(axis=0) - width, 0), points.max(axis=0) + width + 1
    line = np.zeros(label.shape, np.uint8)  # whole: fractions of large coordinates round otherwise than small ones
    _draw_thin(line, [(1, points)])
    # cv2.dilate stamps the mirrored kernel; only even widths, which have no middle, show it.
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))[::-1, ::-1]
    anchor = (width - 1 - width // 2,) * 2
    label[top:bottom, left:right][cv2.dilate(line[top:bottom, left:right], brush, anchor=anchor) > 0] = class_id


def _draw_thin(label: np.ndarray, strokes: list[tuple[int, np.ndarray]]) -> None:
    if not strokes:
        return
    height, width = label.shape
    flat = label.reshape(-1)
    class_ids, arrays = zip(*strokes, strict=True)
    # All strokes as one: what leads from one to the next is a segment that sets the former's last point and no more.
    stroke = np.repeat(np.arange(len(arrays)), [len(points) for points in arrays])
    points = np.concatenate([*arrays, arrays[-1][-1:]]).astype(np.int64)
    points = np.minimum(np.maximum(points, 0), (height - 1, width - 1))
    count = segment_lengths(points)
    count[np.append(np.flatnonzero(np.diff(stroke)), -1)] = 1
    ends = np.cumsum(count)
    if ends[-1] > _MOST_PIXELS:
        raise ValueError(f"strokes of {ends[-1]} pixels in all; {_MOST_PIXELS} are possible")
    first = 0
    while first < len(count):
        drawn = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, drawn + _MAX_PIXELS_AT_ONCE, side="right")))
        pixels = segment_pixels(points[first : last + 1], count[first:last])
        place = pixels[:, 0] * width + pixels[:, 1]
        # NumPy does not say which of several values for one element stays, so that each stroke is set by itself.
        first_stroke, last_stroke = stroke[first], stroke[last - 1]
        segments = np.searchsorted(stroke[first:last], np.arange(first_stroke, last_stroke + 2))
        starts = np.append(0, ends[first:last] - drawn)[segments]
        for class_id, start, stop in zip(class_ids[first_stroke:], starts, starts[1:], strict=False):
            flat[place[start:stop]] = class_id
        first = last


def segment_pixels(points: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The pixels of joined segments by the published rule, each segment without its second end point.

    Between points m = count pixels are set at trunc(r + i * (dr / m)). The quotient is rounded to float64 before it is
    multiplied, as the published converter does: where m is 44 or more, exact arithmetic would put a pixel in some
    thousands elsewhere than the published labels have it.

    Args:
        points: (K, 2) int64 (row, column), non-negative.
        count: (K - 1,) int64, see :func:`segment_lengths`.

    Returns:
        (sum of count, 2) int64, in drawing order.
    """
    slope = np.diff(points, axis=0) / count[:, None]
    step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    pixels = np.repeat(slope, count, axis=0)
    pixels *= step[:, None]
    pixels += np.repeat(points[:-1], count, axis=0)
    return pixels.astype(np.int64)  # truncates


def segment_lengths(points: np.ndarray) -> np.ndarray:
    """Pixels that each segment of a (K, 2) stroke sets, its second end point left out: (K - 1,) int64, >= 1."""
    return np.maximum(np.abs(np.diff(points, axis=0)).max(axis=1, initial=0), 1)
