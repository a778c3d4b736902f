import cv2
import numpy as np
import pytest

from blpseg.scribbles import rasterize, rasterize_strokes


def plain_loop(strokes, height, width):
    """The published converter's rule, pixel by pixel."""
    label = np.full((height, width), 255, np.uint8)
    for value, points in strokes:
        points = [(min(max(int(r), 0), height - 1), min(max(int(c), 0), width - 1)) for r, c in points]
        label[points[0]] = value
        for (r1, c1), (r2, c2) in zip(points, points[1:], strict=False):
            m = max(abs(r2 - r1), abs(c2 - c1))
            if m > 1:
                slope_r, slope_c = (r2 - r1) / m, (c2 - c1) / m
                for i in range(m):
                    label[int(r1 + slope_r * i), int(c1 + slope_c * i)] = value
            label[r1, c1] = value
            label[r2, c2] = value
    return label


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_plain_loop(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 400, 2)
    strokes = []
    for _ in range(rng.integers(0, 12)):
        count = rng.integers(1, 30)
        if rng.random() < 0.5:  # long jumps, some beyond the image
            points = rng.integers(-50, 450, (count, 2))
        else:  # what a hand draws
            points = rng.integers(0, 400, 2) + np.cumsum(rng.integers(-6, 7, (count, 2)), axis=0)
        strokes.append((int(rng.integers(0, 21)), points))
    assert np.array_equal(rasterize_strokes(strokes, height, width), plain_loop(strokes, height, width))


@pytest.mark.parametrize("width", [2, 3, 6, 9])
def test_wide_strokes_are_a_round_brush_on_every_pixel_of_the_rule(width):
    rng = np.random.default_rng(width)
    thin = (4, rng.integers(0, 60, (2, 2)))
    strokes = [(1, rng.integers(-5, 65, (5, 2)), width), thin, (2, rng.integers(0, 60, (3, 2)), width), thin]
    expected = np.full((50, 60), 255, np.uint8)
    brush = np.argwhere(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))) - width // 2
    for value, points, *wide in strokes:
        for pixel in np.argwhere(plain_loop([(value, points)], 50, 60) == value):
            for r, c in pixel + brush if wide else [pixel]:
                if 0 <= r < 50 and 0 <= c < 60:
                    expected[r, c] = value
    assert np.array_equal(rasterize_strokes(strokes, 50, 60), expected)


def test_hand_computed():
    label = rasterize_strokes([(1, np.array([[0, 0], [2, 5]])), (2, np.array([[0, 2]]))], 3, 6)
    # m = 5, rows trunc(0, .4, .8, 1.2, 1.6) then the end point; the one-point stroke is drawn over it
    assert label.tolist() == [
        [1, 1, 2, 255, 255, 255],
        [255, 255, 255, 1, 1, 255],
        [255, 255, 255, 255, 255, 1],
    ]


def test_rounding_of_long_segments_is_the_published_one():
    # exact arithmetic would give row 1 at step 49; in float64, 49 * (2 / 98) is just below 1
    label = rasterize_strokes([(3, np.array([[0, 0], [2, 98]]))], 3, 99)
    assert label[0, 49] == 3 and label[1, 49] == 255


def test_chunks_do_not_change_the_result(monkeypatch):
    strokes = [(1, np.random.default_rng(0).integers(0, 300, (50, 2)))]
    whole = rasterize_strokes(strokes, 300, 300)
    monkeypatch.setattr(rasterize, "_MAX_PIXELS_AT_ONCE", 7)
    assert np.array_equal(rasterize_strokes(strokes, 300, 300), whole)


def test_background_and_errors():
    assert (rasterize_strokes([], 2, 3, background=4) == 4).all()
    for shape, kind, value in [((0, 2), int, 0), ((2, 3), int, 0), ((2, 2), float, 0), ((1, 2), int, 256)]:
        with pytest.raises(ValueError):
            rasterize_strokes([(value, np.zeros(shape, kind))], 4, 4)
