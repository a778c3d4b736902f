"""Distance to the boundary and local thickness against loops over pixels."""

import math

import numpy as np
import pytest
from scipy import ndimage

from blpseg.utils.geometry import THICKNESS_EDGES, boundary_distance, local_thickness


def places_by_loop(mask, edges=THICKNESS_EDGES):
    """Boundary distance and thickness bin of each pixel, from the definitions."""
    pixels = [tuple(p) for p in np.ndindex(mask.shape)]
    distance = {p: min((math.dist(p, q) for q in pixels if mask[q] != mask[p]), default=math.inf) for p in pixels}
    thickness = {}
    for p in pixels:
        fits = [0] + [
            i
            for i, diameter in enumerate(edges)
            if any(distance[q] >= diameter / 2 and math.dist(p, q) < diameter / 2 for q in pixels)
        ]
        thickness[p] = max(fits)
    return distance, thickness


@pytest.mark.parametrize("seed", [0, 1])
def test_distance_and_thickness_against_loops(seed):
    mask = np.clip(ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((22, 26)), 2) * 9 + 1, 0, 3)
    mask = mask.astype(np.uint8)
    distance, thickness = places_by_loop(mask)
    ours = boundary_distance(mask)
    ours_thickness = local_thickness(ours)
    for p in distance:
        assert ours[p] == pytest.approx(distance[p], abs=1e-3)
        assert ours_thickness[p] == thickness[p], p


@pytest.mark.parametrize("width, expected", [(1, 0), (2, 0), (3, 4), (4, 4), (7, 8), (8, 8), (9, 8), (40, 32)])
def test_thickness_of_a_bar(width, expected):
    mask = np.zeros((60, 100), np.uint8)
    mask[:, 30 : 30 + width] = 1
    bins = local_thickness(boundary_distance(mask))
    assert {THICKNESS_EDGES[i] for i in np.unique(bins[mask == 1])} == {expected}


def test_a_single_region_has_no_boundary():
    mask = np.zeros((20, 30), np.uint8)
    assert np.isinf(boundary_distance(mask)).all()
    assert (local_thickness(boundary_distance(mask)) == len(THICKNESS_EDGES) - 1).all()
