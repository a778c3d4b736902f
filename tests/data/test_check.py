"""The doctor finds what was planted, and nothing in a sound data set."""

import json
import os

import cv2
import numpy as np
import pytest

from blpseg.data.check import check_datasets


def check(made_cfg, **options):
    made_cfg()
    return check_datasets(["made_train", "made_val"], **options)


def kinds(report):
    return sorted((finding.kind, os.path.basename(finding.file)) for finding in report.findings)


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_sound_data_is_sound_and_counted(made_cfg, made_folder):
    train, val = check(made_cfg)
    assert train.healthy and val.healthy and not train.findings
    scribbles = [read(p) for p in (made_folder / "scribbles/train").iterdir()]
    masks = [read(p) for p in (made_folder / "masks/train").iterdir()]
    assert train.images == 6 and val.images == 3
    np.testing.assert_array_equal(train.scribble_pixels, [sum((s == c).sum() for s in scribbles) for c in range(3)])
    np.testing.assert_array_equal(train.mask_pixels, [sum((m == c).sum() for m in masks) for c in range(3)])
    np.testing.assert_array_equal(train.scribble_images, [6, 6, 6])
    assert train.annotated == sum((s != 255).sum() for s in scribbles)
    assert train.scribble_area == sum(s.size for s in scribbles)
    assert train.disagreeing.sum() == 0 and train.compared.sum() == train.annotated
    assert train.sizes == {f"{52 - i} x {40 + 2 * i}": 1 for i in range(6)}
    json.dumps(train.as_dict())
    assert "SOUND" not in train.as_text() and "apple" in train.as_text()


def test_results_do_not_depend_on_the_processes(made_cfg):
    assert [r.as_dict() for r in check(made_cfg)] == [r.as_dict() for r in check(made_cfg, workers=3)]


def test_every_fault_is_found(made_cfg, made_folder):
    scribbles = made_folder / "scribbles/train"
    (made_folder / "images/train/train0.jpg").write_bytes(b"no image")
    scribbles.joinpath("train1.png").unlink()
    label = read(scribbles / "train2.png")
    cv2.imwrite(str(scribbles / "train2.png"), label[:-1])
    label = read(scribbles / "train3.png")
    label[0, :5] = 77
    cv2.imwrite(str(scribbles / "train3.png"), label)
    cv2.imwrite(str(scribbles / "train4.png"), np.full_like(read(scribbles / "train4.png"), 255))
    (made_folder / "masks/val/val2.png").write_bytes(read_bytes(made_folder / "masks/val/val2.png")[:40])
    train, val = check(made_cfg)
    assert kinds(train) == [
        ("empty", "train4.png"),
        ("missing", "train1.jpg"),
        ("range", "train3.png"),
        ("size", "train2.png"),
        ("unreadable", "train0.jpg"),
    ]
    assert kinds(val) == [("unreadable", "val2.png")]
    worst = [os.path.basename(finding.file) for finding in train.worst()]
    assert set(worst[:2]) == {"train0.jpg", "train1.jpg"} and worst[2:] == ["train2.png", "train3.png", "train4.png"]
    (finding,) = [f for f in train.findings if f.kind == "range"]
    assert finding.message.startswith("5 pixels have the values 77; classes are 0..2")


def read_bytes(path):
    return path.read_bytes()


@pytest.mark.parametrize("masks", ["masks/train", ""])
def test_zero_as_not_annotated_is_noticed(made_cfg, made_folder, masks):
    for path in (made_folder / "scribbles/train").iterdir():
        label = read(path)
        label[label == 255] = 0
        cv2.imwrite(str(path), label)
    made_cfg("DATASETS.FOLDER.TRAIN_MASKS", masks)
    (train,) = check_datasets(["made_train"], max_disagreement=1.0)
    assert kinds(train) == [("zero", f"train{i}.png") for i in range(6)]


@pytest.mark.parametrize("masks", ["masks/train", ""])
def test_dense_labels_are_not_taken_for_zero_as_not_annotated(made_cfg, made_folder, masks):
    for path in (made_folder / "scribbles/train").iterdir():
        path.write_bytes((made_folder / "masks/train" / path.name).read_bytes())
    made_cfg("DATASETS.FOLDER.TRAIN_MASKS", masks)
    (train,) = check_datasets(["made_train"])
    assert train.healthy


def test_the_class_count_as_not_annotated_is_named(made_cfg, made_folder):
    path = made_folder / "scribbles/train/train0.png"
    label = read(path)
    label[label == 255] = 3
    cv2.imwrite(str(path), label)
    train, _ = check(made_cfg)
    (finding,) = train.findings
    assert "3 seems to mean 'not annotated'" in finding.message


@pytest.mark.parametrize(
    "change, hint",
    [
        (lambda s: np.roll(s, 12, 0), ""),
        (lambda s: s[::-1], "turned upside down"),
        (lambda s: np.roll(s, (1, 2), (0, 1)), "moved by -1 rows and -2 columns"),
    ],
)
def test_strokes_that_contradict_the_mask(made_cfg, made_folder, change, hint):
    path = made_folder / "scribbles/train/train0.png"
    mask = read(made_folder / "masks/train/train0.png")
    label = np.full(mask.shape, 255, np.uint8)
    # Outline the regions from within, so that the smallest shift shows.
    for c in (1, 2):
        inside = (mask == c).astype(np.uint8)
        label[(inside - cv2.erode(inside, np.ones((3, 3), np.uint8))) > 0] = c
    cv2.imwrite(str(path), np.ascontiguousarray(change(label)))
    train, _ = check(made_cfg)
    wrong = ((change(label) != mask) & (change(label) != 255)).sum()
    assert kinds(train) == [("disagreement", "train0.png")]
    assert train.disagreeing.sum() == wrong
    assert train.findings[0].message.startswith(f"{wrong / (label != 255).sum():.1%} of its")
    assert hint in train.findings[0].message
    if not hint:
        assert "would" not in train.findings[0].message


def test_pictures_of_two_splits_are_found_by_their_pixels(made_cfg, made_folder):
    image = cv2.imread(str(made_folder / "images/train/train4.jpg"))
    for path in (made_folder / "images/val/val1.jpg", made_folder / "masks/val/val1.png"):
        path.unlink()
    cv2.imwrite(str(made_folder / "images/val/val1.png"), image)  # the same pixels in another format
    cv2.imwrite(str(made_folder / "masks/val/val1.png"), np.zeros(image.shape[:2], np.uint8))
    train, val = check(made_cfg)
    assert kinds(train) == [("duplicate", "train4.jpg")] and kinds(val) == [("duplicate", "val1.png")]
    assert "val1.png" in train.findings[0].message


def test_a_missing_folder_is_a_finding_with_its_remedy(made_cfg, made_folder):
    (made_folder / "images/val").rename(made_folder / "images/elsewhere")
    train, val = check(made_cfg)
    assert train.healthy and kinds(val) == [("missing", "val")]
    assert "DATASETS.FOLDER.*_IMAGES" in val.findings[0].message


def test_command_line(made_folder, tmp_path, run_tool, capsys):
    config = tmp_path / "made.yaml"
    config.write_text(
        f"DATASETS:\n  TRAIN: ['made_train']\n  TEST: ['made_val']\n  FOLDER:\n    NAME: made\n"
        f"    ROOT: {made_folder}\n    CLASSES: [background, apple, pear]\n"
    )
    assert run_tool("tools/check_dataset.py", "--config-file", str(config)) == 0
    label = read(made_folder / "scribbles/train/train0.png")
    cv2.imwrite(str(made_folder / "scribbles/train/train0.png"), label + 3)
    capsys.readouterr()
    json_file = tmp_path / "report.json"
    assert (
        run_tool("tools/check_dataset.py", "--config-file", str(config), "--json", str(json_file), "--workers", "2")
        == 1
    )
    printed = capsys.readouterr().out
    assert "made_train: NOT SOUND" in printed and "train0.png: " in printed and "made_val: sound" in printed
    report = json.loads(json_file.read_text())
    assert not report["healthy"] and report["datasets"][0]["counts"] == {"range": 1}
    assert run_tool("tools/check_dataset.py", "--dataset", "flowers") == 1
    assert capsys.readouterr().err.startswith("error: data set 'flowers' is not registered")


def test_samples_are_sound(shared_data, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shared_data))
    train, val, camvid = check_datasets(["acdc_scribble_train", "acdc_val", "camvid_val"])
    assert train.healthy and val.healthy and camvid.healthy
    assert 0.009 < train.annotated / train.scribble_area < 0.01
