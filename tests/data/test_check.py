"""The doctor finds what was planted, and nothing in a sound data set."""

import json
import os

import cv2
import numpy as np
import pytest

from blpseg.data.check import check_datasets
from blpseg.utils.made import stamp, write_label


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


def test_labels_that_belong_to_no_image(made_cfg, made_folder):
    scribbles = made_folder / "scribbles/train"
    for i in range(3):
        (scribbles / f"train{i}.png").rename(scribbles / f"train{i}_scribble.png")
    made_cfg("DATASETS.FOLDER.SKIP_UNANNOTATED", True)
    (train,) = check_datasets(["made_train"])
    assert kinds(train) == [("stray", f"train{i}_scribble.png") for i in range(3)]
    assert "3 of 6 images have a scribble; the others are not trained on" in train.notes
    for path in scribbles.glob("train?.png"):
        path.unlink()
    (train,) = check_datasets(["made_train"])
    assert "no image has a scribble" in [f.message for f in train.findings if f.kind == "missing"]


def test_objects_written_as_255(made_cfg, made_folder):
    """Fiji's masks: 0 and 255."""
    for path in (made_folder / "masks/val").iterdir():
        cv2.imwrite(str(path), np.where(read(path) > 0, 255, 0).astype(np.uint8))
    train, val = check(made_cfg)
    assert train.healthy and kinds(val) == [("classes", "made_val")]
    assert "objects as 255" in val.findings[0].message


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
def test_zero_and_255_swapped_are_noticed(made_cfg, made_folder, masks):
    for path in (made_folder / "scribbles/train").iterdir():
        label = read(path).astype(int)
        cv2.imwrite(str(path), np.select([label == 0, label == 255], [255, 0], label).astype(np.uint8))
    made_cfg("DATASETS.FOLDER.TRAIN_MASKS", masks)
    (train,) = check_datasets(["made_train"], max_disagreement=1.0)
    assert kinds(train) == [("zero", f"train{i}.png") for i in range(6)]
    assert "0 and 255 seem to be swapped" in train.findings[0].message


def test_masks_used_as_scribbles_with_void_outlines_are_not_taken_for_swapped(made_cfg, made_folder):
    for path in (made_folder / "scribbles/train").iterdir():
        label = read(made_folder / "masks/train" / path.name)
        edge = cv2.morphologyEx(label, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        label[edge] = 255
        cv2.imwrite(str(path), label)
    assert check(made_cfg)[0].healthy


def rename_labels(folder):
    for path in (folder / "scribbles/train").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))


def masks_beside_images(folder):
    (folder / "scribbles/train/train0.png").rename(folder / "images/train/train0_mask.png")


@pytest.mark.parametrize(
    "change, words",
    [
        (rename_labels, "train0_mask.png seems to be it: labels have the image's name, train0.png"),
        (
            masks_beside_images,
            "seems to be the label of train0.jpg: labels lie in a folder of their own, as train0.png",
        ),
    ],
)
def test_labels_named_otherwise_are_recognised(made_cfg, made_folder, change, words):
    change(made_folder)
    train, _ = check(made_cfg)
    assert any(words in finding.message for finding in train.findings if finding.kind == "missing")


def test_class_counts_and_orders_that_disagree(made_cfg, made_folder):
    (train, _) = check(made_cfg, num_classes=4)
    assert kinds(train) == [("classes", "made_train")] and "NUM_CLASSES is 4" in train.findings[0].message
    write_label(
        str(made_folder / "scribbles/train/train0.png"), read(made_folder / "scribbles/train/train0.png"), stamp(b""),
        classes={0: "background", 1: "pear", 2: "apple"}, force=True,
    )  # fmt: skip
    (train, _) = check(made_cfg, num_classes=3)
    assert kinds(train) == [("classes", "train0.png")] and "1 is 'pear'" in train.findings[0].message


def test_void_value_and_mixed_strokes_are_explained(made_cfg, made_folder):
    mask = read(made_folder / "masks/train/train0.png")
    cv2.imwrite(str(made_folder / "masks/train/train0.png"), np.where(mask == 0, 11, mask))
    for i in (1, 2, 3):
        label = read(made_folder / f"scribbles/train/train{i}.png")
        cv2.imwrite(
            str(made_folder / f"scribbles/train/train{i}.png"),
            np.where(cv2.dilate((label == 1).astype(np.uint8), np.ones((7, 1), np.uint8)) > 0, 1, 255).astype(np.uint8),
        )
    train, _ = check(made_cfg, max_disagreement=1.0)
    assert "set DATASETS.FOLDER.IGNORE_LABEL 11" in train.findings[0].message
    assert any("strokes are " in note for note in train.notes)


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


def test_masks_or_scribbles_are_enough_to_evaluate_by(made_cfg, made_folder):
    if (made_folder / "scribbles/val").is_dir():
        (made_folder / "scribbles/val").rmdir()
    assert not any("scribbles/val" in note for note in check(made_cfg)[1].notes)
    (made_folder / "scribbles/train").rename(made_folder / "scribbles/elsewhere")
    train, _ = check(made_cfg)
    assert any("scribbles/train" in note for note in train.notes) or not train.healthy


def test_command_line(made_folder, tmp_path, run_tool, capsys):
    config = tmp_path / "made.yaml"
    config.write_text(
        f"DATASETS:\n  TRAIN: ['made_train']\n  TEST: ['made_val']\n  FOLDER:\n    NAME: made\n"
        f"    ROOT: {made_folder}\n    CLASSES: [background, apple, pear]\n"
        "MODEL:\n  SEM_SEG_HEAD:\n    NUM_CLASSES: 3\n"
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
