import numpy as np
import pytest
from scipy import ndimage

from blpseg.data.scribbles import simulate_scribble


def made_mask(seed, height=120, width=160, classes=6):
    """Blobs of all sizes, thin ones and specks among them."""
    rng = np.random.default_rng(seed)
    noise = np.stack([ndimage.gaussian_filter(rng.standard_normal((height, width)), 1 + 3 * k) for k in range(classes)])
    mask = (noise / noise.std(axis=(1, 2), keepdims=True)).argmax(axis=0).astype(np.uint8)
    mask[10:12, 5:100] = 1
    mask[:5] = 255
    return mask


@pytest.mark.parametrize("preference", [0, 0.5, 1])
@pytest.mark.parametrize("length", [0, 0.3, 1])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_every_region_is_scribbled_and_never_left(preference, length, width):
    mask = made_mask(1)
    scribble = simulate_scribble(mask, preference=preference, length=length, width=width, seed=5)
    assert scribble.dtype == np.uint8 and scribble.shape == mask.shape
    drawn = scribble != 255
    assert np.array_equal(scribble[drawn], mask[drawn])
    for class_id in np.unique(mask[mask != 255]):
        regions, count = ndimage.label(mask == class_id)
        assert set(np.unique(regions[drawn & (mask == class_id)])) == set(range(1, count + 1))


def test_same_seed_same_scribble():
    mask = made_mask(2)
    first, again, other = (simulate_scribble(mask, seed=s) for s in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_shorter_strokes_are_parts_of_longer_ones():
    mask = made_mask(3)
    drawn = [simulate_scribble(mask, length=x, seed=1) != 255 for x in (0, 0.3, 0.5, 0.8, 1)]
    for shorter, longer in zip(drawn, drawn[1:], strict=False):
        assert not (shorter & ~longer).any()
        assert shorter.sum() < longer.sum()


def test_ignored_values():
    mask = np.full((40, 50), 11, np.uint8)
    assert (simulate_scribble(mask, ignore_label=11) == 255).all()
    mask[5:30, 5:30] = 2
    scribble = simulate_scribble(mask, ignore_label=11)
    assert set(np.unique(scribble)) == {2, 255}


@pytest.mark.parametrize("shape, value", [((3, 3), 0.5), ((2, 3, 3), 0), ((0, 3), 0), ((3, 3), 300), ((3, 3), -1)])
def test_not_a_mask(shape, value):
    with pytest.raises(ValueError):
        simulate_scribble(np.full(shape, value))


@pytest.mark.parametrize("wrong", [{"preference": 1.1}, {"length": -0.1}, {"width": 0}, {"width": 1.5}])
def test_argument_out_of_range(wrong):
    with pytest.raises(ValueError):
        simulate_scribble(np.zeros((4, 4), int), **wrong)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 2)])
def test_tiny_masks(shape):
    assert (simulate_scribble(np.zeros(shape, np.uint8), width=1) == 0).any()
