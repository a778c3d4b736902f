"""The instant model: the regression, the way to the photo's pixels, and real photographs."""

import cv2
import numpy as np
import pytest

from blpseg.annotate import instant
from blpseg.annotate.instant import Features, Instant, fit, guided, join, model_path, save_arrays
from blpseg.annotate.store import Project
from blpseg.scribbles import VOC_NAMES
from blpseg.utils.files import read_label

from .conftest import stroke


def test_regression_is_at_its_minimum():
    rng = np.random.default_rng(0)
    target, share, offset = np.repeat([0, 2], [30, 6]), rng.random(36), rng.normal(size=(36, 3))
    samples = (rng.normal(size=(36, 4)) + target[:, None]).astype(np.float32)

    def objective(weights, bias):
        total = instant._DECAY * ((weights**2).sum() + (bias**2).sum())
        for x, c, weight, known in zip(samples, target, share, offset, strict=True):
            logits = x @ weights + bias + known
            total += weight * (np.log(np.exp(logits).sum()) - logits[c])
        return total

    weights, bias = fit(samples, target, 3, share, offset, iterations=500)
    least = objective(weights, bias)
    for _ in range(50):
        assert objective(weights + rng.normal(0, 0.02, weights.shape), bias + rng.normal(0, 0.02, 3)) > least


def test_class_maps_follow_the_edges_of_the_photo():
    image = np.full((80, 120, 3), 40, np.uint8)
    truth = np.zeros((80, 120), np.uint8)
    cv2.circle(truth, (61, 37), 22, 3, -1)
    image[truth == 3] = (200, 120, 60)
    grid = (20, 30)
    guide = cv2.resize(image, grid[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    coarse = cv2.resize(truth, grid[::-1], interpolation=cv2.INTER_NEAREST).astype(np.float32)
    logits = 8 * (np.stack([3 - coarse, coarse]) / 3 - 0.5)
    result = guided(Features(image, [], grid, guide), logits, np.array([0, 3]))
    blocks = cv2.resize(coarse.astype(np.uint8), (120, 80), interpolation=cv2.INTER_NEAREST)
    assert (result != truth).mean() < 0.2 * (blocks != truth).mean()


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_training_sees_the_features_that_prediction_uses(factor):
    """The value sampled at a cell's middle is that of the enlarged map, of which the padding is cut off."""
    grid = (13, 21)
    size = -(-grid[0] // factor), -(-grid[1] // factor)
    level = np.random.default_rng(0).normal(size=(3, *size)).astype(np.float32)
    enlarged = instant._enlarge(level, factor, grid)
    rows, columns = (i.reshape(-1) for i in np.indices(grid))
    sampled = instant._sample(level, (rows + 0.5, columns + 0.5), factor)
    np.testing.assert_allclose(sampled.T.reshape(3, *grid), enlarged, atol=1e-5)


def test_strokes_are_what_they_say_and_the_rest_follows():
    rng = np.random.default_rng(0)
    truth = np.zeros((48, 64), np.uint8)
    truth[12:40, 20:50] = 4
    label = np.full((48, 64), 255, np.uint8)
    label[20, 25:45], label[4, 8:50], label[44, 3:20] = 4, 0, 0
    coarse = cv2.resize((truth == 4).astype(np.float32), (16, 12), interpolation=cv2.INTER_AREA)
    level = np.stack([coarse, rng.normal(0, 0.1, coarse.shape)]).astype(np.float32)
    features = Features(np.zeros((48, 64, 3), np.uint8), [(1, level)], (12, 16), np.zeros((12, 16, 3), np.float32))
    logits, classes = join(features, label)
    assert list(classes) == [0, 4]
    whole = (coarse == 0) | (coarse == 1)  # cells of one class
    assert np.array_equal((logits.argmax(axis=0) == 1)[whole], coarse[whole] == 1)


def test_one_stroke_corrects_a_trained_model_where_it_is_wrong_and_nowhere_else():
    """Three kinds of places, alike by 0.8 as features of photos are; the model takes the third for the second."""
    grid = (12, 18)
    kind = np.repeat(np.arange(3), 6)[None].repeat(12, axis=0)
    directions = np.sqrt(0.8) * np.eye(4)[3] + np.sqrt(0.2) * np.eye(4)[:3]
    level = directions[kind].transpose(2, 0, 1).astype(np.float32)
    known = np.log(np.where(np.arange(3)[:, None, None] == np.minimum(kind, 1), 0.9, 0.05))
    features = Features(np.zeros((48, 72, 3), np.uint8), [(1, level)], grid, np.zeros((*grid, 3), np.float32), known)
    label = np.full((48, 72), 255, np.uint8)
    label[20, 52:66] = 2
    assert np.array_equal(join(features, label)[0].argmax(axis=0), kind)


def test_strokes_of_two_classes_overrule_a_trained_model_that_is_wrong_there(monkeypatch):
    """The model takes everything for the third class, and so do its anchors, until the strokes contradict them."""
    grid = (12, 18)
    kind = np.repeat(np.arange(2), 9)[None].repeat(12, axis=0)
    directions = np.sqrt(0.9) * np.eye(3)[2] + np.sqrt(0.1) * np.eye(3)[:2]
    level = directions[kind].transpose(2, 0, 1).astype(np.float32)
    known = np.log(np.full((3, *grid), 0.01) + np.array([0, 0, 0.97])[:, None, None])
    features = Features(np.zeros((48, 72, 3), np.uint8), [(1, level)], grid, np.zeros((*grid, 3), np.float32), known)
    label = np.full((48, 72), 255, np.uint8)
    label[8, 5:30] = 0
    assert (join(features, label)[0].argmax(axis=0) == 2).any(), "one class says nothing of the rest"
    label[40, 42:60] = 1
    logits = join(features, label)[0]
    assert np.array_equal(logits.argmax(axis=0), kind)
    monkeypatch.setattr(instant, "_REFITS", 0)
    held = join(features, label)[0]
    assert (held[2] - held[:2].max(axis=0) > logits[2] - logits[:2].max(axis=0)).all(), "the anchors held it back"


def test_predictions_of_a_project(project):
    model = Instant(project)
    photo = project.photo("a.jpg")
    assert model.predict(photo)[1] == "none" and (model.predict(photo)[0] == 255).all()
    project.write(photo, {"strokes": [stroke(1, [30, 30], [50, 32])]})
    label, source = model.predict(photo)
    assert source == "strokes" and (label == 1).all(), "one class is all that is known"
    project.write(photo, {"strokes": [stroke(1, [30, 30], [50, 32]), stroke(0, [4, 4], [76, 5])]})
    label, _ = model.predict(photo)
    truth = np.zeros((60, 80), np.uint8)
    truth[15:-15, 20:-20] = 1
    assert (label == truth).mean() > 0.95
    files = list((project.root / ".cache/features").iterdir())
    assert [f.name for f in files] == ["a.npz"]
    files[0].write_bytes(b"damaged")
    assert (Instant(project).predict(photo)[0] == label).mean() > 0.99, "the cache only saves time"
    model.close()


def test_a_class_that_is_added_is_not_in_the_models_view(project):
    model, photo = Instant(project), project.photo("a.jpg")
    view = {"features": np.ones((2, 15, 20)), "log_probability": np.full((3, 15, 20), -np.log(3))}
    save_arrays(model_path(project.root, "a"), **view)
    assert model.predict(photo)[1] == "model"
    project.add_class("root")
    project.write(photo, {"strokes": [stroke(3, [30, 30], [50, 32]), stroke(0, [4, 4], [76, 5])]})
    label, source = model.predict(photo)
    assert source == "both" and label[30, 40] == 3 and label[4, 40] == 0
    model.close()


def test_voc_photographs(shared_data, tmp_path):
    """Photographs with simulated scribbles; docs/ANNOTATE.md has the figure for 24 of them."""
    root = shared_data / "VOCdevkit"
    names = (root / "VOC2012/ImageSets/Segmentation/val.txt").read_text().split()[5::90]
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / f"photos/{name}.jpg").write_bytes((root / f"VOC2012/JPEGImages/{name}.jpg").read_bytes())
    project = Project(tmp_path / "project", tmp_path / "photos", VOC_NAMES)
    from blpseg.scribbles import simulate_scribble

    model, scores = Instant(project), []
    for photo in project.photos.values():
        mask = read_label(str(root / f"VOC2012/SegmentationClassAug/{photo.stem}.png"))
        scribble = simulate_scribble(mask, preference=0.5, width=3, seed=0)
        cv2.imwrite(str(project.label_path(photo)), scribble)
        label, _ = model.predict(photo)
        label = np.where(mask == 255, 255, label)
        scores.append(np.mean([((label == c) & (mask == c)).sum() / ((label == c) | (mask == c)).sum()
                               for c in np.setdiff1d(mask, 255)]))  # fmt: skip
    assert len(scores) == 4 and np.mean(scores) > 0.8
