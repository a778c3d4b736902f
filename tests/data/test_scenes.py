"""The generated data set: reproducible, resumable, and neither trivial nor empty."""

import json

import cv2
import numpy as np
import pytest

from blpseg.data.datasets.synthetic import CLASSES
from blpseg.utils.errors import BLPSegError
from datasets.make_synthetic import draw_scene, make_synthetic

SMALL = {"size": (48, 64), "train": 6, "val": 3}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_same_settings_same_files_whatever_the_processes(tmp_path):
    assert make_synthetic(str(tmp_path / "a"), **SMALL)
    assert make_synthetic(str(tmp_path / "b"), **SMALL, workers=2)
    made = contents(tmp_path / "a")
    assert made == contents(tmp_path / "b")
    assert len(made) == 3 * 6 + 2 * 3 and len(set(made.values())) == len(made)
    assert cv2.imread(str(tmp_path / "a/images/train/000000.png")).shape == (48, 64, 3)
    make_synthetic(str(tmp_path / "c"), **SMALL, seed=1)
    assert not set(contents(tmp_path / "c").values()) & set(made.values())


def test_up_to_date_resumed_and_made_anew(tmp_path):
    folder = tmp_path / "a"
    make_synthetic(str(folder), **SMALL)
    made = contents(folder)
    assert not make_synthetic(str(folder), **SMALL)
    for name in ("images/train/000002.png", "scribbles/train/000004.png", "masks/val/000001.png"):
        (folder / name).unlink()
    kept = (folder / "images/train/000000.png").stat().st_mtime_ns
    assert make_synthetic(str(folder), **SMALL)
    assert contents(folder) == made and (folder / "images/train/000000.png").stat().st_mtime_ns == kept
    assert make_synthetic(str(folder), **(SMALL | {"train": 4}))
    assert len(list((folder / "images/train").iterdir())) == 4
    assert json.loads((folder / "metadata.json").read_text())["train"] == 4


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BLPSegError, match="not made here; choose another"):
        make_synthetic(str(tmp_path), **SMALL)
    (tmp_path / "metadata.json").write_text('{"generator": "someone else"}')
    with pytest.raises(BLPSegError, match="not written by make_synthetic"):
        make_synthetic(str(tmp_path), **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metadata.json", "precious.txt"]


@pytest.mark.parametrize(
    "bad",
    [
        {"size": (16, 64)},
        {"train": 0},
        {"preference": 2},
        {"own_hue": -1},
        {"colour_overlap": 1.5},
        {"train": 1, "shuffle_scribbles": True},
    ],
)
def test_settings_are_checked(tmp_path, bad):
    with pytest.raises(BLPSegError):
        make_synthetic(str(tmp_path / "a"), **(SMALL | bad))


def test_shuffled_scribbles_all_belong_to_other_images(tmp_path):
    make_synthetic(str(tmp_path / "a"), **SMALL)
    make_synthetic(str(tmp_path / "b"), **SMALL, shuffle_scribbles=True)
    plain, shuffled = contents(tmp_path / "a"), contents(tmp_path / "b")
    names = [name for name in plain if name.startswith("scribbles")]
    assert sorted(plain[name] for name in names) == sorted(shuffled[name] for name in names)
    assert all(plain[name] != shuffled[name] for name in names)
    assert all(plain[name] == shuffled[name] for name in plain if name not in names)


def scenes(start, count, *look):
    return [draw_scene(np.random.default_rng((7, i)), 96, 96, *look) for i in range(start, start + count)]


def test_scribbles_agree_with_their_masks(tmp_path):
    make_synthetic(str(tmp_path / "a"), **SMALL)
    for path in (tmp_path / "a/scribbles/train").iterdir():
        scribble, mask = cv2.imread(str(path), -1), cv2.imread(str(tmp_path / "a/masks/train" / path.name), -1)
        drawn = scribble != 255
        assert (scribble == mask)[drawn].all() and 0 < drawn.mean() < 0.4
        assert set(np.unique(mask)) == set(np.unique(scribble[drawn]))


def test_shapes_have_bodies_limbs_and_holes():
    thin = np.zeros(len(CLASSES))
    area = np.zeros(len(CLASSES))
    holes = 0
    for _, mask in scenes(0, 60):
        for c in range(1, len(CLASSES)):
            shape = (mask == c).astype(np.uint8)
            body = cv2.morphologyEx(shape, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
            area[c] += shape.sum()
            thin[c] += shape.sum() - body.sum()
        holes += cv2.connectedComponents((mask == 0).astype(np.uint8), connectivity=4)[0] - 2
    assert (area[1:] > 0).all()
    share = thin[1:] / area[1:]
    # Corners and limbs everywhere, and yet most of every kind is body.
    assert (share > 0.02).all() and (share < 0.6).all()
    assert holes > 20


def guess_from_colour(*look):
    """mIoU of the best guess from a pixel's colour alone, learned from dense masks."""

    def keys(image):
        return (image.astype(int) >> 4) @ (256, 16, 1)

    counts = np.zeros((4096, len(CLASSES)))
    for image, mask in scenes(0, 100, *look):
        np.add.at(counts, (keys(image), mask), 1)
    best = 0.0
    for weights in (1.0, 1 / counts.sum(0)):
        guess = (counts * weights).argmax(1)
        confusion = np.zeros((len(CLASSES), len(CLASSES)))
        for image, mask in scenes(1000, 30, *look):
            np.add.at(confusion, (mask, guess[keys(image)]), 1)
        hits = np.diag(confusion)
        best = max(best, (hits / (confusion.sum(0) + confusion.sum(1) - hits)).mean())
    return best


def test_colour_alone_does_not_tell_the_class_and_tells_more_with_own_hues():
    scores = [guess_from_colour(own_hue) for own_hue in (0, 0.7, 1)]
    assert scores[0] < scores[1] - 0.03 < scores[2] - 0.06
    assert scores[1] < 0.3


def test_without_overlap_colour_tells_most_and_the_masks_stay():
    assert guess_from_colour(1, 0) > guess_from_colour(1, 1) + 0.2
    for (_, mask), (_, apart) in zip(scenes(0, 10, 0.7, 1), scenes(0, 10, 0.7, 0), strict=True):
        assert (mask == apart).all()
