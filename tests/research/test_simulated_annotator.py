"""The simulated annotator against cases by hand and a stand-in for the server; the load test against the real one."""

import argparse

import cv2
import numpy as np
import pytest

from blpseg.scribbles.rasterize import rasterize_strokes
from research import simulated_annotator
from research.simulated_annotator import Server, curve, load, photo_iou, stroke_of_largest_error


def raster(strokes, shape):
    strokes = [(s["class"], np.array(s["points"])[:, ::-1], s["width"]) for s in strokes]
    return rasterize_strokes(strokes, *shape)


@pytest.fixture
def mask():
    """Background, a large square of class 2 and a small one of class 1; the last row is ignored."""
    mask = np.zeros((40, 60), np.uint8)
    mask[5:25, 5:30], mask[30:36, 40:50], mask[-1] = 2, 1, 255
    return mask


def test_the_largest_error_is_stroked(mask):
    prediction = np.where(mask == 255, 0, mask)
    assert stroke_of_largest_error(prediction, mask, 3, 0) == []
    prediction[31:34, 41:45] = 0
    prediction[6:12, 8:20] = 1  # the larger one
    drawn = raster(stroke_of_largest_error(prediction, mask, 3, 0), mask.shape)
    inside = np.zeros(mask.shape, bool)
    inside[6:12, 8:20] = True
    assert (drawn == 2).any() and (drawn[~inside] == 255).all() and set(np.unique(drawn)) == {2, 255}
    # Before anything is known, everything is wrong, and the background is largest.
    drawn = raster(stroke_of_largest_error(np.full(mask.shape, 255, np.uint8), mask, 1, 0), mask.shape)
    assert (mask[drawn != 255] == 0).all() and (drawn == 0).any()


def test_iou_of_a_photo_by_hand(mask):
    assert photo_iou(np.where(mask == 255, 1, mask), mask, 3) == 100
    assert photo_iou(np.full_like(mask, 255), mask, 3) == 0
    background, total = (mask == 0).sum(), (mask != 255).sum()
    assert photo_iou(np.zeros_like(mask), mask, 3) == pytest.approx(100 * background / total / 3)


class StandIn:
    """Predicts the class of the nearest stroke; a training run is done when it is asked about."""

    def __init__(self, shapes):
        self.strokes = {name: [] for name in shapes}
        self.shapes, self.trained = shapes, 0

    def draw(self, photo, strokes):
        self.strokes[photo] += strokes

    def ask(self, method, path, body=None):
        if path == "next":
            score = 0.5 if self.trained else None
            return {"images": [{"name": name, "score": score} for name in sorted(self.shapes, reverse=True)]}
        if path == "train":
            self.trained += method == "POST"
            return {"state": "done"}
        photo = path.removeprefix("predict/")
        known = raster(self.strokes[photo], self.shapes[photo]) if self.strokes[photo] else None
        if known is None:
            return np.full(self.shapes[photo], 255, np.uint8)
        _, nearest = cv2.distanceTransformWithLabels(
            (known == 255).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        values = np.zeros(nearest.max() + 1, np.uint8)
        values[nearest[known != 255]] = known[known != 255]
        return values[nearest]


def test_curve(mask):
    masks = {"a.jpg": mask, "b.jpg": mask[:, ::-1].copy(), "c.jpg": mask}
    args = argparse.Namespace(strokes=4, width=3, seed=0, seconds=2.5)
    vars(args).update(train=0, order="ranked", photos_a_round=1, trainings=2)
    rows = list(curve(StandIn({name: m.shape for name, m in masks.items()}), masks, args, 3))
    assert [(row["mode"], row["strokes"], row["human seconds"]) for row in rows] == [
        ("instant", 3 * n, 7.5 * n) for n in (1, 2, 3, 4)
    ]
    assert rows[0]["mIoU"] < rows[2]["mIoU"] and rows[-1]["mIoU"] > 50
    server = StandIn({name: m.shape for name, m in masks.items()})
    args.train = 5
    rounds = curve(server, masks, args, 3)
    first = next(rounds)
    assert first["mode"] == "trained, ranked" and server.trained == 1
    assert sum(bool(strokes) for strokes in server.strokes.values()) == 1, "at random"
    best = max(name for name, strokes in server.strokes.items() if not strokes)
    next(rounds)
    assert server.trained == 2 and server.strokes[best], "the first in the server's order"
    assert len(list(rounds)) == 1 and server.trained == 2 and all(server.strokes.values())


@pytest.mark.slow
def test_no_acknowledged_stroke_is_lost(tmp_path, capsys):
    pytest.importorskip("fastapi")
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / "photos" / name), np.zeros((30, 40, 3), np.uint8))
    server = Server(tmp_path / "project", tmp_path / "photos", ["background", "thing"])
    try:
        assert load(server, argparse.Namespace(total=24, clients=3, kills=1)) == 0
    finally:
        server.stop()
    assert "24 strokes acknowledged to 3 clients, 1 times SIGKILL, 0 lost" in capsys.readouterr().out
    assert simulated_annotator.TOOL.is_file()
