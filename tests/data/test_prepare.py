"""datasets/prepare_*.py on made trees: what is written, twice, with bad files among the good ones."""

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from blpseg.data.datasets import load_records
from blpseg.utils.errors import BLPSegError
from datasets import prepare_acdc, prepare_camvid, prepare_cityscapes, prepare_pascal_context, prepare_pascal_voc

h5py = pytest.importorskip("h5py")


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def no_leftovers(folder):
    return not [p for p in folder.rglob("*.tmp")]


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2012"
    for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for stem in ("2009_b", "2007_a", "2010_c", "2008_d"):
        (root / f"JPEGImages/{stem}.jpg").touch()
        (root / f"SegmentationClassAug/{stem}.png").touch()
    (root / "ImageSets/Segmentation/val.txt").write_text("2010_c\n")
    return root


def test_voc_list_is_sorted_without_val(voc, capsys):
    assert prepare_pascal_voc.prepare(str(voc)) == 0
    path = voc / "ImageSets/Segmentation/trainaug.txt"
    assert path.read_text() == "2007_a\n2008_d\n2009_b\n"
    captured = capsys.readouterr()
    assert "3 names, written" in captured.out and "10582" in captured.err
    before = snapshot(voc)
    assert prepare_pascal_voc.prepare(str(voc)) == 0
    assert snapshot(voc) == before and "up to date" in capsys.readouterr().out


def test_voc_problems_are_named(voc, capsys):
    (voc / "JPEGImages/2008_d.jpg").unlink()
    (voc / "ImageSets/Segmentation/val.txt").write_text("2010_c\n2011_x\n")
    assert prepare_pascal_voc.prepare(str(voc)) == 1
    captured = capsys.readouterr().err
    assert "no image 2008_d" in captured and "2011_x has no mask" in captured
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(BLPSegError, match="val.txt: no such list; datasets/README.md"):
        prepare_pascal_voc.prepare(str(voc))


@pytest.fixture
def context(tmp_path):
    """459 labels of which 59, in another order, are kept; three spelt otherwise; two .mat files."""
    root = tmp_path / "VOCdevkit" / "Context"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    kept = ["diningtable", "bedcloth", "clothes"] + [f"thing {i}" for i in range(56)]
    labels = [f"other{i}" for i in range(397)] + [f"thing {i}" for i in range(56)][::-1]
    labels += ["cloth", "table", "bedclothes", "last1", "last2", "last3"]
    assert len(labels) == 459
    folder = root / "SegmentationClass"
    (folder / "labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(labels, 1)))
    (folder / "59_labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(kept, 1)))
    expected = {name: i for i, name in enumerate(kept, 1)}
    expected |= {"table": 1, "bedclothes": 2, "cloth": 3}
    rng = np.random.default_rng(0)
    masks = {}
    for stem in ("a", "b"):
        label_map = rng.integers(0, 460, (37, 29)).astype(np.uint16)
        savemat(folder / f"{stem}.mat", {"LabelMap": label_map})
        masks[stem] = np.array([[0 if v == 0 else expected.get(labels[v - 1], 0) for v in row] for row in label_map])
    for name, stem in (("train", "a"), ("val", "b")):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text(f"{stem}\n")
    return root, masks


def test_context_mat_becomes_60_classes(context, capsys):
    root, masks = context
    assert prepare_pascal_context.prepare(str(root)) == 0
    folder = root / "SegmentationClass"
    for stem, mask in masks.items():
        assert {0, 1, 2, 3} <= set(np.unique(mask)) and len(np.unique(mask)) > 50
        np.testing.assert_array_equal(cv2.imread(str(folder / f"{stem}.png"), cv2.IMREAD_UNCHANGED), mask)
    before = snapshot(root)
    assert prepare_pascal_context.prepare(str(root), workers=2) == 0
    assert snapshot(root) == before and "0 60-class masks written" in capsys.readouterr().out
    savemat(folder / "a.mat", {"LabelMap": np.full((3, 3), 459)})
    prepare_pascal_context.prepare(str(root))
    printed = capsys.readouterr().out
    assert "1 60-class masks written" in printed and "1 up to date" in printed


def test_context_bad_files_are_named_and_the_others_done(context, run_tool, capsys):
    tree, masks = context
    folder = tree / "SegmentationClass"
    (folder / "c.mat").write_bytes(b"MATLAB 5.0 MAT-file" + b"\0" * 200)
    savemat(folder / "d.mat", {"LabelMap": np.full((3, 3), 460)})
    savemat(folder / "e.mat", {"Something": 1})
    assert run_tool("datasets/prepare_pascal_context.py", "--root", str(tree), "--workers", "2") == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    for stem in "cde":
        assert f"error: {folder}/{stem}.mat: " in printed and not (folder / f"{stem}.png").exists()
    for stem, mask in masks.items():
        np.testing.assert_array_equal(cv2.imread(str(folder / f"{stem}.png"), cv2.IMREAD_UNCHANGED), mask)
    assert no_leftovers(tree)


def test_context_png_masks(context, tmp_path, capsys):
    tree, _ = context
    folder = tree / "SegmentationClass"
    for path in folder.glob("*.mat"):
        path.unlink()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    names = [
        {"plane": "aeroplane", "bike": "bicycle", "plant": "pottedplant", "monitor": "tvmonitor"}.get(n, n)
        for n in prepare_pascal_context.CLASSES
    ]
    alphabetical = ["background", *sorted(names[1:])]
    mask = np.random.default_rng(1).integers(0, 60, (20, 20)).astype(np.uint8)
    for stem in ("a", "b"):
        cv2.imwrite(
            str(theirs / f"{stem}.png"),
            np.array([alphabetical.index(names[v]) for v in mask.ravel()], np.uint8).reshape(20, 20),
        )
    assert prepare_pascal_context.prepare(str(tree), png=str(theirs), png_order="alphabetical") == 0
    np.testing.assert_array_equal(cv2.imread(str(folder / "a.png"), cv2.IMREAD_UNCHANGED), mask)
    assert prepare_pascal_context.prepare(str(tree)) == 0  # masks that are there are checked
    cv2.imwrite(str(folder / "b.png"), np.full((4, 4), 60, np.uint8))
    assert prepare_pascal_context.prepare(str(tree)) == 1
    assert "b.png: value 60" in capsys.readouterr().err
    (folder / "b.png").unlink()
    assert prepare_pascal_context.prepare(str(tree)) == 1
    assert "val.txt: 1 names have no mask" in capsys.readouterr().err
    with pytest.raises(BLPSegError, match="must not be the output"):
        prepare_pascal_context.prepare(str(tree), png=str(folder))


def test_context_lists_must_fit(context):
    tree, _ = context
    (tree / "SegmentationClass/59_labels.txt").write_text("1: unicorn\n")
    with pytest.raises(BLPSegError, match="'unicorn' is not in labels.txt"):
        prepare_pascal_context.prepare(str(tree))


def write_h5(path, image, label, scribble):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"], file["label"], file["scribble"] = image, label, scribble


@pytest.fixture
def h5(tmp_path):
    """A slice and a volume to train on, a volume to validate on."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in (
        ("slices/patient021_frame01_slice_4", (9, 7)),
        ("volumes/patient021_frame01", (6, 9, 7)),  # the slices of this frame come first
        ("volumes/patient022_frame05", (2, 8, 6)),
        ("volumes/patient003_frame02", (3, 8, 8)),
    ):
        arrays[name] = (
            rng.random(shape).astype(np.float32),
            rng.integers(0, 4, shape).astype(np.uint8),
            rng.integers(0, 5, shape).astype(np.uint16),
        )
        write_h5(tmp_path / f"ACDC/ACDC_training_{name}.h5", *arrays[name])
    return tmp_path, arrays


def test_acdc_h5_becomes_png(h5, capsys):
    root, arrays = h5
    output = root / "acdc_png"
    assert prepare_acdc.prepare(str(root / "ACDC"), str(output)) == 0
    expected = {}
    for name, parts in arrays.items():
        if name == "volumes/patient021_frame01":
            continue
        split = "val" if "003" in name else "train"
        stem, _, first = name.split("/")[1].partition("_slice_")
        volume = [part if part.ndim == 3 else part[None] for part in parts]
        for i in range(len(volume[0])):
            for folder, part in zip(("images", "masks", "scribbles"), volume, strict=True):
                if folder == "images":
                    part = np.round(part * 255)
                elif folder == "scribbles":
                    part = np.where(part == 4, 255, part)
                expected[f"{folder}/{split}/{stem}_slice_{int(first or 0) + i}.png"] = part[i]
    expected = {name: array for name, array in expected.items() if not name.startswith("scribbles/val")}
    assert {str(p.relative_to(output)) for p in output.rglob("*.png")} == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(cv2.imread(str(output / name), cv2.IMREAD_UNCHANGED), array, err_msg=name)
    before = snapshot(output)
    assert prepare_acdc.prepare(str(root / "ACDC"), str(output), workers=2) == 0
    assert snapshot(output) == before and "3 up to date" in capsys.readouterr().out


def test_acdc_folds(h5):
    root, _ = h5
    assert prepare_acdc.prepare(str(root / "ACDC"), str(root / "two"), fold=2) == 0
    assert {p.name[:10] for p in (root / "two/images/val").iterdir()} == {"patient021", "patient022"}
    assert {p.name[:10] for p in (root / "two/scribbles/train").iterdir()} == {"patient003"}


def test_acdc_bad_files_are_named_and_the_others_done(h5, capsys):
    root, arrays = h5
    folder = root / "ACDC/ACDC_training_slices"
    image, label, scribble = arrays["slices/patient021_frame01_slice_4"]
    (folder / "patient030_frame01_slice_0.h5").write_bytes(b"no hdf5")
    write_h5(folder / "patient031_frame01_slice_0.h5", image * 300, label, scribble)
    write_h5(folder / "patient032_frame01_slice_0.h5", image, label + 1, scribble)
    write_h5(folder / "patient033_frame01_slice_0.h5", image, label, scribble[:3])
    (folder / "patient034_frame01_slice_0.h5").touch()
    (folder / "notes.h5").touch()
    output = root / "acdc_png"
    assert prepare_acdc.prepare(str(root / "ACDC"), str(output)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for name, why in (
        ("patient030_frame01_slice_0", "not an .h5 file"),
        ("patient031_frame01_slice_0", "0..1"),
        ("patient032_frame01_slice_0", "whole numbers 0..3"),
        ("patient033_frame01_slice_0", "one shape"),
        ("patient034_frame01_slice_0", "not an .h5 file"),
        ("notes", "patientNNN"),
    ):
        assert any(f"{name}.h5: " in line and why in line for line in lines), name
    assert len(list((output / "images/train").iterdir())) == 3 and no_leftovers(output)
    with pytest.raises(BLPSegError, match="no .h5 file"):
        prepare_acdc.prepare(str(root), str(output))


def test_acdc_samples_agree_with_the_published_slices(shared_data, tmp_path):
    assert prepare_acdc.prepare(str(shared_data / "ACDC"), str(tmp_path / "out")) == 0
    made = sorted((tmp_path / "out").rglob("*.png"))
    assert len(made) == 3 * 14 + 2 * 10
    for path in made:
        theirs = shared_data / "acdc_png" / path.relative_to(tmp_path / "out")
        np.testing.assert_array_equal(cv2.imread(str(path), -1), cv2.imread(str(theirs), -1), err_msg=path.name)


@pytest.fixture
def camvid_tree(tmp_path):
    root = tmp_path / "CamVid"
    mask = np.zeros((36, 48), np.uint8)
    mask[:, 20:], mask[10:20, 5:40], mask[30:] = 3, 8, 11
    for name, count in (("train", 3), ("val", 2)):
        for folder in (name, f"{name}annot"):
            (root / folder).mkdir(parents=True)
        for i in range(count):
            cv2.imwrite(str(root / f"{name}/{name}{i}.png"), np.full((36, 48, 3), 90, np.uint8))
            cv2.imwrite(str(root / f"{name}annot/{name}{i}.png"), mask)
    return root, mask


def test_camvid_scribbles(camvid_tree, capsys):
    root, mask = camvid_tree
    assert prepare_camvid.prepare(str(root)) == 0
    scribbles = [cv2.imread(str(p), -1) for p in sorted((root / "trainscribble").glob("*.png"))]
    assert len(scribbles) == 3
    for scribble in scribbles:
        assert set(np.unique(scribble)) == {0, 3, 8, 255}  # nothing in the void
        assert (scribble == mask)[scribble != 255].all()
    assert (scribbles[0] != scribbles[1]).any()  # each image has a seed of its own
    before = snapshot(root)
    assert prepare_camvid.prepare(str(root)) == 0
    assert snapshot(root) == before
    assert prepare_camvid.prepare(str(root), preference=1.0) == 0
    assert "3 scribbles written" in capsys.readouterr().out.splitlines()[-1]


def test_camvid_problems_are_named(camvid_tree, capsys):
    root, _ = camvid_tree
    (root / "val/val1.png").unlink()
    (root / "trainannot/train0.png").write_bytes(b"no png")
    cv2.imwrite(str(root / "trainannot/train1.png"), np.full((36, 48), 12, np.uint8))
    cv2.imwrite(str(root / "valannot/val0.png"), np.zeros((48, 36), np.uint8))
    assert prepare_camvid.prepare(str(root)) == 1
    captured = capsys.readouterr().err
    for text in (
        "val1.png: has no partner",
        "train0.png: not an image",
        "train1.png: value 12",
        "val0.png: not of the size",
    ):
        assert text in captured
    assert (root / "trainscribble/train2.png").exists()
    with pytest.raises(BLPSegError, match="no such folder; datasets/README.md"):
        prepare_camvid.prepare(str(root / "nowhere"))


@pytest.fixture
def cityscapes_tree(tmp_path):
    """Two cities as published: label ids, in the scribbles as three equal channels with 0 for not annotated."""
    ids = np.array([[7, 8, 11, 12, 13, 17, 19], [20, 21, 22, 23, 24, 25, 26], [27, 28, 31, 32, 33, 0, 1]], np.uint8)
    for city, part in (("aachen", "train"), ("ulm", "train"), ("munster", "val")):
        stem = f"{city}_000000_000019"
        for folder in (f"cityscapes/leftImg8bit/{part}/{city}", f"cityscapes/gtFine/{part}/{city}"):
            (tmp_path / folder).mkdir(parents=True)
        image = tmp_path / f"cityscapes/leftImg8bit/{part}/{city}/{stem}_leftImg8bit.png"
        cv2.imwrite(str(image), np.zeros((3, 7, 3), np.uint8))
        masks = tmp_path / f"cityscapes/gtFine/{part}/{city}"
        cv2.imwrite(str(masks / f"{stem}_gtFine_labelIds.png"), ids)
        cv2.imwrite(str(masks / f"{stem}_gtFine_color.png"), np.full((3, 7, 3), (1, 2, 3), np.uint8))
        if part == "train":
            scribbles = tmp_path / f"s4Cityscapes/scribbles/gtFine/train/{city}"
            scribbles.mkdir(parents=True)
            (scribbles / f"{stem}_gtFine_labelIds.h5").touch()
            drawn = ids * (np.arange(7) % 2).astype(np.uint8)
            cv2.imwrite(str(scribbles / f"{stem}_gtFine_labelIds.png"), np.dstack([drawn] * 3))
    return tmp_path


def test_cityscapes_ids_become_classes(cityscapes_tree, monkeypatch, capsys):
    assert prepare_cityscapes.prepare(str(cityscapes_tree)) == 0
    before = snapshot(cityscapes_tree)
    assert prepare_cityscapes.prepare(str(cityscapes_tree)) == 0
    assert snapshot(cityscapes_tree) == before and "5 up to date" in capsys.readouterr().out
    monkeypatch.setenv("DETECTRON2_DATASETS", str(cityscapes_tree))
    train, val = load_records("s4cityscapes_scribble_train"), load_records("s4cityscapes_val")
    assert [record["image_id"] for record in train] == ["aachen_000000_000019", "ulm_000000_000019"]
    assert all(record["file_name"].endswith("_leftImg8bit.png") for record in train + val)
    classes = np.array([*range(19), 255, 255]).reshape(3, 7)  # as cityscapesScripts' table of train ids
    for record in train + val:
        np.testing.assert_array_equal(cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED), classes)
    scribble = cv2.imread(train[1]["scribble_file_name"], cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(scribble, np.where(np.arange(7) % 2, classes, 255))
    assert len(val) == 1 and "scribble_file_name" not in val[0]


def test_cityscapes_problems_are_named(cityscapes_tree, capsys):
    bad = cityscapes_tree / "s4Cityscapes/scribbles/gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png"
    bad.write_bytes(b"no png")
    assert prepare_cityscapes.prepare(str(cityscapes_tree)) == 1
    assert f"{bad}: not an image" in capsys.readouterr().err
    with pytest.raises(BLPSegError, match="no such folder; datasets/README.md"):
        prepare_cityscapes.prepare(str(cityscapes_tree / "nowhere"))


def test_ade20k_scribbles(tmp_path, run_tool, monkeypatch):
    """Values 1..150 with 0 for not annotated, as three equal channels; the commands of datasets/README.md."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    values = np.array([[0, 1, 150], [0, 12, 0]], np.uint8)
    ade, scribbles = tmp_path / "ADEChallengeData2016", tmp_path / "s4ADE20K/scribbles/training"
    for folder in (ade / "images/training", ade / "annotations/training", scribbles):
        folder.mkdir(parents=True)
    cv2.imwrite(str(ade / "images/training/ADE_train_00000001.jpg"), np.zeros((2, 3, 3), np.uint8))
    cv2.imwrite(str(ade / "annotations/training/ADE_train_00000001.png"), values)
    cv2.imwrite(str(scribbles / "ADE_train_00000001.png"), np.dstack([values] * 3))
    for source, output in (
        (scribbles, tmp_path / "s4ADE20K/labels/training"),
        (ade / "annotations/training", ade / "annotations_detectron2/training"),
    ):
        options = ("--label-png", str(source), "--unannotated-value", "0", "--output", str(output))
        assert run_tool("datasets/prepare_scribbles.py", *options) == 0
    (record,) = load_records("s4ade20k_scribble_train")
    for key in ("scribble_file_name", "sem_seg_file_name"):
        np.testing.assert_array_equal(cv2.imread(record[key], cv2.IMREAD_UNCHANGED), [[255, 0, 149], [255, 11, 255]])


def h5_links(path):
    with h5py.File(path, "w") as file:
        file["label"], file["scribble"] = np.zeros((2, 4, 4), np.uint8), np.zeros((4, 4), np.uint8)
        file["image"] = h5py.ExternalLink(str(path.with_name("secret.h5")), "image")


def h5_elsewhere(path):
    with h5py.File(path, "w") as file:
        file["label"], file["scribble"] = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
        secret = [(str(path.with_name("secret.h5")), 0, 64)]
        file.create_dataset("image", (4, 4), np.float32, external=secret)


def h5_bomb(path):
    with h5py.File(path, "w") as file:
        for key in ("image", "label", "scribble"):
            file.create_dataset(key, (1 << 16, 1 << 16), np.uint8, chunks=(1024, 1024), compression="gzip")


@pytest.mark.parametrize("make", [h5_links, h5_elsewhere, h5_bomb])
def test_acdc_reads_numbers_of_the_file_alone(tmp_path, capsys, make):
    folder = tmp_path / "ACDC/ACDC_training_slices"
    folder.mkdir(parents=True)
    write_h5(folder / "secret.h5", np.ones((4, 4)), np.ones((4, 4)), np.ones((4, 4)))
    make(folder / "patient030_frame01_slice_0.h5")
    assert prepare_acdc.prepare(str(tmp_path / "ACDC"), str(tmp_path / "out"), workers=1) == 1
    assert "patient030_frame01_slice_0.h5: image " in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))


def mat_nested(path):
    value = np.zeros((1, 1), object)
    for _ in range(200):
        outer = np.zeros((1, 1), object)
        outer[0, 0] = value
        value = outer
    savemat(path, {"LabelMap": value})


MATS = {
    "cells in cells": mat_nested,
    "more than memory": lambda path: savemat(path, {"LabelMap": np.zeros((1 << 14, 1 << 14))}, do_compression=True),
    "version 4": lambda path: savemat(path, {"LabelMap": np.zeros((3, 3))}, format="4"),
    "cut short": lambda path: path.write_bytes(b"MATLAB".ljust(126) + b"IM" + b"\x0f\0\0\0\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("name", MATS)
def test_context_mat_is_one_line(context, capsys, name):
    root, _ = context
    MATS[name](root / "SegmentationClass/c.mat")
    assert prepare_pascal_context.prepare(str(root), workers=1) == 1
    assert "c.mat: not a .mat file with LabelMap" in capsys.readouterr().err


def test_what_was_not_made_here_stays(context, h5, camvid_tree, cityscapes_tree, capsys):
    """Of each command: a file of somebody else's is named and left alone, and replaced with force."""
    (tree, _), (root, _), (camvid, _) = context, h5, camvid_tree
    for path, run in (
        (tree / "SegmentationClass/a.png", lambda **o: prepare_pascal_context.prepare(str(tree), workers=1, **o)),
        (root / "out/masks/train/patient021_frame01_slice_4.png",
         lambda **o: prepare_acdc.prepare(str(root / "ACDC"), str(root / "out"), workers=1, **o)),
        (camvid / "trainscribble/train1.png", lambda **o: prepare_camvid.prepare(str(camvid), workers=1, **o)),
        (cityscapes_tree / "s4Cityscapes/masks/val/munster_000000_000019.png",
         lambda **o: prepare_cityscapes.prepare(str(cityscapes_tree), workers=1, **o)),
    ):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((36, 48), np.uint8))
        before = path.read_bytes()
        assert run() == 1 and path.read_bytes() == before
        assert f"{path}: not made by this command" in capsys.readouterr().err
        assert run(force=True) == 0 and path.read_bytes() != before
        assert run() == 0
