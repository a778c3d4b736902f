"""Distance of a pixel to its region's boundary, and thickness of the region at the pixel.

The image's edge is no boundary: a region that it cuts goes on outside, and nobody knows how far.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

# Pixels; bin i holds EDGES[i] <= value < EDGES[i + 1], the last one everything above.
DISTANCE_EDGES = (0, 2, 4, 8, 16, 32, 64)
THICKNESS_EDGES = (0, 4, 8, 16, 32, 64, 128)


def distance_to(pixels: np.ndarray) -> np.ndarray:
    """Euclidean distance of each pixel to the nearest of some, at least one: (H, W) bool -> (H, W) float32, pixels."""
    return cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def boundary_distance(label: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest pixel with another value; 255 (ignored) counts as another.

    (H, W) uint8 -> (H, W) float32 in pixels, 1 beside a boundary; infinite if the label has only one value.
    """
    values = np.unique(label)
    if len(values) == 1:
        return np.full(label.shape, np.inf, np.float32)
    distance = np.zeros(label.shape, np.float32)
    for value in values:
        same = label == value
        distance[same] = distance_to(~same)[same]
    return distance


def distance_bins(distance: np.ndarray, edges: Sequence[float] | np.ndarray = DISTANCE_EDGES) -> np.ndarray:
    """(H, W) distances, none below the first of the ascending ``edges`` -> (H, W) uint8, the bin of each."""
    return (np.searchsorted(edges, distance, side="right") - 1).astype(np.uint8)


def local_thickness(distance: np.ndarray, edges: Sequence[float] | np.ndarray = THICKNESS_EDGES) -> np.ndarray:
    """Diameter of the largest disc that fits into a pixel's region and covers the pixel, by bins.

    A disc of radius r around a pixel q, {p: |p - q| < r}, lies in q's region where q's boundary distance is at least
    r (Hildebrand and Rueegsegger 1997). A bar of 3 or 4 pixels measures 4.

    Args:
        distance: (H, W), of :func:`boundary_distance`.
        edges: ascending diameters in pixels; every pixel reaches the first.

    Returns:
        (H, W) uint8, the index i of the largest ``edges[i]`` that is reached.
    """
    bins = np.zeros(distance.shape, np.uint8)
    for i, diameter in enumerate(edges[1:], start=1):
        centers = distance >= diameter / 2
        if not centers.any():
            break
        bins[distance_to(centers) < diameter / 2] = i
    return bins
