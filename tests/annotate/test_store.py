"""Strokes and labels on the disk."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import yaml

from blpseg import get_cfg
from blpseg.annotate import store
from blpseg.annotate.regions import region_at, region_strokes
from blpseg.annotate.store import Conflict, Project
from blpseg.data.datasets import load_records
from blpseg.scribbles import rasterize_strokes
from blpseg.utils.errors import BLPSegError

from .conftest import CLASSES, stroke


def label_of(project, name):
    return cv2.imread(str(project.label_path(project.photo(name))), cv2.IMREAD_UNCHANGED)


def test_label_is_what_the_rasteriser_draws(project):
    photo = project.photo("a.jpg")
    strokes = [stroke(1, [3.7, 4.2], [70, 50], width=5), stroke(2, [99, -7], [20, 20.9], width=1), stroke(0, [8, 8])]
    assert project.write(photo, {"strokes": strokes})["version"] == 1
    expected = rasterize_strokes(
        [(1, np.array([[4, 3], [50, 70]]), 5), (2, np.array([[0, 79], [20, 20]])), (0, np.array([[8, 8]]), 3)], 60, 80
    )
    assert np.array_equal(label_of(project, "a.jpg"), expected)
    on_disk = json.loads((project.root / "strokes/a.json").read_text())
    assert on_disk == project.read(photo) == {
        "image": "a.jpg", "width": 80, "height": 60, "version": 1, "strokes": strokes,
    }  # fmt: skip


def test_strokes_that_come_one_by_one_give_the_same_label(project):
    a, b = project.photo("a.jpg"), project.photo("b c.png")
    strokes = [stroke(1, [3, 4], [70, 50], width=5), stroke(2, [60, 4], [9, 50]), stroke(0, [30, 2], [30, 40], width=1)]
    for photo, count in ((a, 1), (a, 3), (b, 2), (a, 2), (a, 3), (a, 0), (a, 3)):
        project.write(photo, {"strokes": strokes[:count]})
        plain = [(s["class"], np.array(s["points"])[:, ::-1], s["width"]) for s in strokes[:count]]
        assert np.array_equal(label_of(project, photo.name), rasterize_strokes(plain, photo.height, photo.width))


def test_later_writer_of_two_is_refused_and_loses_nothing(project):
    photo = project.photo("a.jpg")
    first = project.write(photo, {"strokes": [stroke(1, [1, 1])], "version": 0})
    with pytest.raises(Conflict, match="version 1, yours goes back to 0"):
        project.write(photo, {"strokes": [stroke(2, [5, 5])], "version": 0})
    assert project.read(photo) == first
    assert project.write(photo, {"strokes": [], "version": 1})["version"] == 2
    assert (label_of(project, "a.jpg") == 255).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (["class", 3], "none of the 3"),
        (["class", True], "none of the 3"),
        (["class", "../x"], "none of the 3"),
        (["width", 0], "width"),
        (["width", float("nan")], "width"),
        (["width", 101], "width"),
        (["points", []], "not a list of"),
        (["points", [[1, 2, 3]]], "not a list of"),
        (["points", [[1, "2"]]], "no number"),
        (["points", [[1, float("inf")]]], "not finite"),
        (["points", [[0, 0], [10**400, 0]] * 3], None),
        (["time", "<b>"], "time"),
        (["time", 10**400], "time"),
    ],
)
def test_strokes_that_are_none(project, change, message):
    photo = project.photo("a.jpg")
    document = {"strokes": [stroke(1, [1, 1]), stroke(1, [1, 1]) | dict([change])]}
    if message is None:
        project.write(photo, document)  # far outside is drawn at the edge
        return
    with pytest.raises(BLPSegError, match=message):
        project.write(photo, document)
    assert not project.strokes_path(photo).exists() and not project.label_path(photo).exists()


def test_bounds_on_what_one_photo_holds(project, monkeypatch):
    monkeypatch.setattr(store, "MAX_STROKES", 2)
    monkeypatch.setattr(store, "MAX_POINTS", 5)
    monkeypatch.setattr(store, "_MAX_LENGTH", 100)
    photo = project.photo("a.jpg")
    for strokes in ([stroke(1, [1, 1])] * 3, [stroke(1, *[[1, 1]] * 6)], [stroke(1, [0, 0], [79, 0], [0, 0])]):
        with pytest.raises(BLPSegError, match="more than 2|more than 5|longer than 100"):
            project.write(photo, {"strokes": strokes})


def test_one_process_at_a_time(project, root):
    command = [sys.executable, "-W", "ignore", str(root / "tools/annotate.py"), str(project.root), "--port", "0"]
    second = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert second.returncode == 1 and "another annotator serves this project" in second.stderr


def test_restart_with_more_photos_and_classes(project, photos):
    photo = project.photo("b c.png")
    saved = project.write(photo, {"strokes": [stroke(1, [2, 2], [30, 30])]})
    before = label_of(project, "b c.png")
    project.close()
    project.label_path(photo).unlink()  # as if the process had been killed between strokes and label
    (photos / "a.jpg").write_bytes(b"changed since: what the project has stays")
    (photos / "e.png").write_bytes((photos / "d#1.png").read_bytes())
    again = Project(project.root, photos, [*CLASSES, "pot"])
    assert list(again.photos) == ["a.jpg", "b c.png", "d#1.png", "e.png"]
    assert again.read(again.photo("b c.png")) == saved and again.photo("b c.png").count == 1
    assert np.array_equal(label_of(again, "b c.png"), before)
    assert again.classes[-1] == "pot" and again.colors[:3] == project.colors and len(set(again.colors)) == 4
    again.add_class("soil")
    assert again.classes[-2:] == ["pot", "soil"]
    with pytest.raises(BLPSegError, match="name these first"):
        again.close() or Project(project.root, classes=["leaf", "background"])


def test_png_scribbles_of_another_program_become_strokes_and_are_kept(project):
    photo = project.photo("a.jpg")
    label = np.full((60, 80), 255, np.uint8)
    cv2.circle(label, (30, 30), 12, 1, 3)
    label[50, 3:60] = 0
    label[np.random.default_rng(0).random(label.shape) < 0.02] = 2
    cv2.imwrite(str(project.label_path(photo)), label)
    imported = project.read(photo)
    assert imported["version"] == 0 and np.array_equal(project.rasterize(photo, imported), label)
    project.write(photo, {"strokes": [*imported["strokes"], stroke(1, [70, 55])], "version": 0})
    now = label_of(project, "a.jpg")
    assert (now[label != 255] == label[label != 255]).mean() > 0.99 and now[55, 70] == 1
    cv2.imwrite(str(project.label_path(photo)), label[::-1])  # somebody draws with another program beside us
    project.write(photo, {"strokes": []})
    (kept,) = (project.root / "scribbles/replaced").iterdir()
    assert np.array_equal(cv2.imread(str(kept), cv2.IMREAD_UNCHANGED), label[::-1])


def test_a_kill_between_strokes_and_label_moves_no_label_away(project, monkeypatch):
    photo = project.photo("a.jpg")
    project.write(photo, {"strokes": [stroke(1, [5, 5], [30, 5])]})
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(store, "write_label", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        project.write(photo, {"strokes": [stroke(2, [5, 40], [30, 40])]})
    project.close()
    again = Project(project.root)
    assert label_of(again, "a.jpg")[40, 20] == 2 and label_of(again, "a.jpg")[5, 20] == 255
    assert not (again.root / "scribbles/replaced").exists()


@pytest.mark.parametrize("seed", range(6))
def test_region_as_strokes_is_exact(seed):
    rng = np.random.default_rng(seed)
    region = cv2.GaussianBlur(rng.random((40, 57)), (0, 0), 0.3 + seed / 2) > 0.5
    strokes = region_strokes(region, 7)
    assert len(strokes) == cv2.connectedComponents(region.astype(np.uint8), connectivity=8)[0] - 1
    drawn = rasterize_strokes([(s["class"], np.array(s["points"])[:, ::-1]) for s in strokes], *region.shape)
    assert np.array_equal(drawn == 7, region) and set(np.unique(drawn)) <= {7, 255}
    row, column = np.argwhere(region)[0]
    part = region_at(region.astype(np.uint8), row, column)
    assert part[row, column] and not (part & ~region).any()
    assert len(region_strokes(part, 1)) == 1


def test_trainable_with_the_photos_scribbled_so_far(project):
    project.write(project.photo("a.jpg"), {"strokes": [stroke(1, [2, 2], [30, 30])]})
    cfg = get_cfg(str(project.config_path))
    (name,) = cfg.DATASETS.TRAIN
    (record,) = load_records(name)
    assert record["file_name"].endswith("a.jpg") and cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    assert not cfg.DATASETS.TEST and cfg.OUTPUT_DIR == str(project.root / "models")
    written = yaml.safe_load(project.config_path.read_text())
    assert "_BASE_" not in written and written["DATASETS"]["FOLDER"]["CLASSES"] == CLASSES
