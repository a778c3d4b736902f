"""A region as a stroke: one line through all of its pixels and no others."""

from __future__ import annotations

import cv2
import numpy as np


def region_at(label: np.ndarray, row: int, column: int) -> np.ndarray:
    """The pixels of one value that are connected (8 neighbours) with the pixel at (row, column): (H, W) bool."""
    _, parts = cv2.connectedComponents((label == label[row, column]).astype(np.uint8), connectivity=8)
    return parts == parts[row, column]


def region_strokes(region: np.ndarray, class_id: int) -> list[dict]:
    """Strokes, one pixel wide, whose rasterisation is exactly ``region``: one for each 8-connected part.

    Args:
        region: (H, W) bool.
        class_id: of the strokes.

    Returns:
        stroke documents as ``PROJECT/strokes`` holds them.
    """
    region = np.asarray(region, bool)
    edges = np.diff(np.pad(region, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, first), (_, last) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    runs = np.stack([rows, first, last - 1], axis=1)  # row by row, each from left to right
    return [
        {"class": class_id, "width": 1, "points": [[int(x), int(y)] for x, y in walk], "time": 0}
        for walk in _walks(runs, len(region))
    ]


def _walks(runs: np.ndarray, height: int):
    """Depth-first through the runs of each part, along rows and one pixel up or down, and back the same way."""
    start = np.searchsorted(runs[:, 0], np.arange(height + 1))
    seen = np.zeros(len(runs), bool)

    def neighbours(i):
        row, first, last = runs[i]
        for other in (row - 1, row + 1):
            if 0 <= other < height:
                part = runs[start[other] : start[other + 1]]
                low = np.searchsorted(part[:, 2], first - 1)
                high = np.searchsorted(part[:, 1], last + 1, side="right")
                yield from range(start[other] + low, start[other] + high)

    for origin in range(len(runs)):
        if seen[origin]:
            continue
        seen[origin] = True
        row, first, last = runs[origin]
        walk = [(first, row), (last, row)]
        stack = [(origin, neighbours(origin), [])]
        while stack:
            here, others, way_back = stack[-1]
            there = next((i for i in others if not seen[i]), None)
            if there is None:
                stack.pop()
                walk += way_back if stack else []
                continue
            seen[there] = True
            row, first, last = runs[here]
            other, left, right = runs[there]
            out = min(max(first, left), last)  # where this run is left ...
            into = min(max(out, left), right)  # ... and the other entered, at most one column further
            walk += [(out, row), (into, other), (left, other), (right, other)]
            stack.append((there, neighbours(there), [(into, other), (out, row)]))
        yield walk
