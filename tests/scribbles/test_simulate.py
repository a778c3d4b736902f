import numpy as np
import pytest
from scipy import ndimage

from blpseg.scribbles import file_seed, simulate_folder, simulate_scribble
from blpseg.utils.files import read_label, write_png_atomic


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
    for seed in range(5):
        mask = made_mask(seed)
        scribble = simulate_scribble(mask, preference=preference, length=length, width=width, seed=seed)
        assert scribble.dtype == np.uint8 and scribble.shape == mask.shape
        drawn = scribble != 255
        assert np.array_equal(scribble[drawn], mask[drawn])
        for class_id in np.unique(mask[mask != 255]):
            regions, count = ndimage.label(mask == class_id)
            assert set(np.unique(regions[drawn & (mask == class_id)])) == set(range(1, count + 1))


def test_preference_is_for_spacious_places():
    rows, columns = np.mgrid[:120, :150]
    blob = ((rows - 60) ** 2 + (columns - 50) ** 2 < 40**2) | ((abs(rows - 60) < 6) & (columns > 50) & (columns < 145))
    clearance = ndimage.distance_transform_edt(blob)
    share = {}  # clearance where a stroke is, relative to that of the whole region
    for preference in (0, 0.5, 1):
        drawn = [simulate_scribble(blob.astype(int), preference=preference, width=1, seed=s) == 1 for s in range(30)]
        share[preference] = np.mean([clearance[d].mean() for d in drawn]) / clearance[blob].mean()
    assert 0.6 < share[0] < 1.1  # anywhere
    assert share[0] + 0.25 < share[0.5] < share[1] - 0.5
    assert share[1] > 0.6 * clearance.max() / clearance[blob].mean()  # the middle only


def test_strokes_do_not_run_along_the_axes():
    # A person's strokes: neighbouring steps turn little, and few lie exactly along a row or column.
    mask = np.zeros((360, 480), np.uint8)
    drawn = np.argwhere(simulate_scribble(mask, width=1, seed=3) == 0)
    assert 100 < len(drawn) < 3000
    rows, columns = (len(np.unique(drawn[:, axis])) for axis in (0, 1))
    assert rows > 30 and columns > 30


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


def test_folder(tmp_path):
    (tmp_path / "masks").mkdir()
    for number in range(4):
        write_png_atomic(str(tmp_path / "masks" / f"{number}.png"), made_mask(number))
    (tmp_path / "masks" / "bad.png").write_text("no image")
    reports = [
        simulate_folder(str(tmp_path / "masks"), str(tmp_path / out), seed=7, workers=workers, progress=False)
        for out, workers in (("one", 1), ("two", 2), ("two", 2))
    ]
    assert [(r.written, r.up_to_date, len(r.failed)) for r in reports] == [(4, 0, 1), (4, 0, 1), (0, 4, 1)]
    assert "bad.png" in reports[0].failed[0]
    for number in range(4):
        path = tmp_path / "one" / f"{number}.png"
        expected = simulate_scribble(made_mask(number), seed=file_seed(7, f"{number}.png"))
        assert np.array_equal(read_label(str(path)), expected)
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert file_seed(7, "0.png") != file_seed(7, "1.png") != file_seed(8, "1.png")
    changed = simulate_folder(str(tmp_path / "masks"), str(tmp_path / "one"), seed=8, workers=1, progress=False)
    assert changed.written == 4


def test_wrong_ignore_label_is_named(tmp_path):
    (tmp_path / "masks").mkdir()
    write_png_atomic(str(tmp_path / "masks" / "a.png"), made_mask(0))
    report = simulate_folder(str(tmp_path / "masks"), str(tmp_path / "out"), ignore_label=11, workers=1, progress=False)
    assert "--ignore-label" in report.failed[0]
