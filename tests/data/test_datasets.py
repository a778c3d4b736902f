"""Registered data sets: names, trees, what is said when something is missing."""

import importlib
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from blpseg.data.datasets import (
    acdc,
    camvid,
    load_records,
    pascal_context,
    pascal_voc,
    register_folder,
    splits,
    synthetic,
)
from blpseg.data.datasets.splits import voc_colors
from blpseg.utils.errors import BLPSegError

VOC, CONTEXT, SCRIBBLES = "VOCdevkit/VOC2012", "VOCdevkit/Context", "VOCdevkit/scribble_annotation"
# name: classes, ignore label, images, scribbles, masks, list
TREES = {
    "voc_2012_scribble_trainaug": (
        *(21, 255, f"{VOC}/JPEGImages", f"{SCRIBBLES}/pascal_2012_label", f"{VOC}/SegmentationClassAug"),
        f"{VOC}/ImageSets/Segmentation/trainaug.txt",
    ),
    "voc_2012_val": (
        *(21, 255, f"{VOC}/JPEGImages", None, f"{VOC}/SegmentationClassAug"),
        f"{VOC}/ImageSets/Segmentation/val.txt",
    ),
    "pascal_context_scribble_train": (
        *(60, 255, f"{CONTEXT}/JPEGImages", f"{SCRIBBLES}/pascal_context_label", f"{CONTEXT}/SegmentationClass"),
        f"{CONTEXT}/ImageSets/Segmentation/train.txt",
    ),
    "pascal_context_val": (
        *(60, 255, f"{CONTEXT}/JPEGImages", None, f"{CONTEXT}/SegmentationClass"),
        f"{CONTEXT}/ImageSets/Segmentation/val.txt",
    ),
    "camvid_scribble_train": (11, 11, "CamVid/train", "CamVid/trainscribble", "CamVid/trainannot", None),
    "camvid_val": (11, 11, "CamVid/val", None, "CamVid/valannot", None),
    "camvid_test": (11, 11, "CamVid/test", None, "CamVid/testannot", None),
    "acdc_scribble_train": (
        *(4, 255, "acdc_png/images/train", "acdc_png/scribbles/train", "acdc_png/masks/train", None),
    ),
    "acdc_val": (4, 255, "acdc_png/images/val", None, "acdc_png/masks/val", None),
    "synthetic_scribble_train": (
        *(7, 255, "synthetic/images/train", "synthetic/scribbles/train", "synthetic/masks/train", None),
    ),
    "s4pascal_scribble_train": (
        *(21, 255, f"{VOC}/JPEGImages", "s4Pascal/scribble/VOCScribble_aug_auto", f"{VOC}/SegmentationClassAug"),
        f"{VOC}/ImageSets/Segmentation/trainaug.txt",
    ),
    "s4ade20k_scribble_train": (
        *(150, 255, "ADEChallengeData2016/images/training", "s4ADE20K/labels/training"),
        *("ADEChallengeData2016/annotations_detectron2/training", None),
    ),
    "s4ade20k_val": (
        *(150, 255, "ADEChallengeData2016/images/validation", None),
        *("ADEChallengeData2016/annotations_detectron2/validation", None),
    ),
    "synthetic_val": (7, 255, "synthetic/images/val", None, "synthetic/masks/val", None),
}


def grow(root, name, stems):
    """Make the tree of a data set."""
    _, _, images, scribbles, masks, names = TREES[name]
    for folder, extension in ((images, ".jpg" if "JPEG" in images else ".png"), (scribbles, ".png"), (masks, ".png")):
        if folder is None:
            continue
        (root / folder).mkdir(parents=True)
        for stem in stems:
            cv2.imwrite(str(root / folder / (stem + extension)), np.zeros((6, 9), np.uint8))
    if names:
        (root / names).parent.mkdir(parents=True)
        (root / names).write_text("\n".join(stems) + "\n")


@pytest.mark.parametrize("name", TREES)
def test_tree_becomes_records(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    stems = ["patient007_frame01_slice_3", "patient007_frame01_slice_12"]
    grow(tmp_path, name, stems)
    classes, ignore_label, images, scribbles, masks, names = TREES[name]
    records = DatasetCatalog.get(name)
    if names is None:
        stems = sorted(stems)
    assert [record["image_id"] for record in records] == stems
    for record, stem in zip(records, stems, strict=True):
        assert record["file_name"].startswith(str(tmp_path / images / stem))
        assert record["sem_seg_file_name"] == str(tmp_path / masks / f"{stem}.png")
        assert record.get("scribble_file_name") == (str(tmp_path / scribbles / f"{stem}.png") if scribbles else None)
        assert (record["height"], record["width"]) == (6, 9)
        if name.startswith("acdc"):
            assert (record["volume_id"], record["slice_index"]) == ("patient007_frame01", int(stem.rsplit("_", 1)[1]))
    metadata = MetadataCatalog.get(name)
    assert len(metadata.stuff_classes) == len(set(metadata.stuff_classes)) == len(metadata.stuff_colors) == classes
    assert metadata.ignore_label == ignore_label
    assert metadata.evaluator_type == ("sem_seg_volume" if name.startswith("acdc") else "sem_seg")


def test_every_split_is_covered_above():
    assert set(TREES) <= set(splits())


@pytest.mark.parametrize("name", TREES)
def test_missing_data_is_told_with_a_command(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    with pytest.raises(BLPSegError, match=r"nowhere.*python datasets/\w+\.py") as caught:
        DatasetCatalog.get(name)
    assert "\n" not in str(caught.value)


def test_missing_scribbles_and_lists_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    grow(tmp_path, "voc_2012_scribble_trainaug", ["a", "b"])
    labels = tmp_path / SCRIBBLES / "pascal_2012_label"
    (labels / "b.png").unlink()
    with pytest.raises(BLPSegError, match="1 of 2 images, first 'b'; run `python datasets/prepare_scribbles.py"):
        load_records("voc_2012_scribble_trainaug")
    assert "scribble_file_name" not in load_records("voc_2012_scribble_trainaug", optional=("scribbles",))[1]
    (tmp_path / VOC / "SegmentationClassAug/a.png").unlink()  # optional for training
    assert "sem_seg_file_name" not in load_records("voc_2012_scribble_trainaug", optional=("scribbles",))[0]
    (tmp_path / VOC / "ImageSets/Segmentation/trainaug.txt").unlink()
    with pytest.raises(BLPSegError, match="trainaug.txt: no such list; run `python datasets/prepare_pascal_voc.py"):
        load_records("voc_2012_scribble_trainaug")
    with pytest.raises(BLPSegError, match="'flowers' is not registered; there are acdc_scribble_train, "):
        load_records("flowers")


def test_registering_touches_no_disk(monkeypatch):
    """A hook that sees every file and folder opened (it cannot be removed, only be silenced)."""
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data-root-of-the-test")
    touched, listening = [], True

    def hook(event, arguments):
        if listening and arguments and str(arguments[0]).startswith("/data-root-of-the-test"):
            touched.append((event, arguments))

    sys.addaudithook(hook)
    for module in (acdc, camvid, pascal_context, pascal_voc, synthetic):
        importlib.reload(module)
    assert not touched
    with pytest.raises(BLPSegError):
        DatasetCatalog.get("synthetic_val")
    with pytest.raises(OSError):
        Path("/data-root-of-the-test/x").open()
    assert touched  # the hook does listen
    listening = False


def test_voc_colors_are_the_published_ones():
    assert voc_colors(256)[1:4] == [(128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert voc_colors(256)[20] == (0, 64, 128) and voc_colors(256)[255] == (224, 224, 192)


def test_folder_is_registered_again_and_again(made_cfg, made_folder):
    cfg = made_cfg()
    register_folder(cfg)
    register_folder(cfg)
    train, val = load_records("made_train"), load_records("made_val")
    assert [record["image_id"] for record in train] == [f"train{i}" for i in range(6)]
    assert [(record["height"], record["width"]) for record in val] == [(40, 52), (42, 51), (44, 50)]
    assert all("sem_seg_file_name" in record for record in train + val)
    assert all("scribble_file_name" not in record for record in val)
    assert MetadataCatalog.get("made_val").stuff_classes == ["background", "apple", "pear"]
    made_cfg("DATASETS.FOLDER.CLASSES", ["ground", "apple", "pear"])  # other content replaces
    assert MetadataCatalog.get("made_val").stuff_classes[0] == "ground"


@pytest.mark.parametrize(
    "opts, why",
    [
        (("NAME", "voc_2012_scribble", "ROOT", "x"), None),
        (("NAME", "camvid"), "camvid_val is another data set"),
        *((("NAME", name), "results are written into folders") for name in ("../x", "/x", "a/../b", "..", ".", "a\\b")),
        (("ROOT", ""), "ROOT is empty"),
        (("CLASSES", []), "either CLASSES"),
        (("CLASSES_FILE", "classes.yaml"), "either CLASSES"),
        (("CLASSES", ["a", "a"]), "different strings"),
        (("CLASSES", ["a"]), "2 to 254"),
        (("EVALUATOR", "boxes"), "sem_seg_volume"),
    ],
)
def test_folder_settings_are_checked(made_cfg, opts, why):
    opts = [f"DATASETS.FOLDER.{o}" if i % 2 == 0 else o for i, o in enumerate(opts)]
    if why is None:
        made_cfg(*opts)
        return
    with pytest.raises(BLPSegError, match=why):
        made_cfg(*opts)


def test_classes_file(made_cfg, made_folder):
    path = made_folder / "classes.yaml"
    file = ("DATASETS.FOLDER.CLASSES", [], "DATASETS.FOLDER.CLASSES_FILE", "classes.yaml")
    path.write_text("classes: [ground, apple, pear]\ncolors: [[0, 0, 0], [255, 0, 0], [0, 255, 0]]\n")
    made_cfg(*file)
    metadata = MetadataCatalog.get("made_train")
    assert metadata.stuff_classes == ["ground", "apple", "pear"] and metadata.stuff_colors[1] == (255, 0, 0)
    path.write_text(
        'pear: {id: 2, color: "#00ff00"}\nground: {id: 0, color: "#000000"}\napple: {id: 1, color: "#ff0000"}\n'
    )
    made_cfg(*file)  # a vocabulary of the converters
    metadata = MetadataCatalog.get("made_train")
    assert metadata.stuff_classes == ["ground", "apple", "pear"] and metadata.stuff_colors[1] == (255, 0, 0)
    for text, why in (
        ("classes: [a, b]\ncolors: [[0, 0, 0]]", "one .R, G, B."),
        ("a: 0\nb: 2", "numbers 0, 1"),
        ("classes: [1, 2]", "different strings"),
        ("{", "YAML"),
    ):
        path.write_text(text)
        with pytest.raises(BLPSegError, match=why):
            made_cfg(*file)
    path.unlink()
    with pytest.raises(BLPSegError, match="no such file"):
        made_cfg(*file)


def test_folder_files_must_pair(made_cfg, made_folder):
    made_cfg()
    (made_folder / "masks/val/val1.png").unlink()
    with pytest.raises(BLPSegError, match="masks/val: no file for 1 of 3 images, first 'val1'; DATASETS.FOLDER"):
        load_records("made_val")
    (made_folder / "images/val/val0.png").write_bytes(b"")
    with pytest.raises(BLPSegError, match="val0.jpg has the same stem|val0.png has the same stem"):
        load_records("made_val")


def test_rotated_photographs_have_their_upright_size(made_cfg, made_folder):
    made_cfg()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((52, 40, 3), np.uint8)).save(made_folder / "images/train/train0.jpg", exif=exif)
    record = load_records("made_train")[0]
    assert (record["height"], record["width"]) == (40, 52)


def test_acdc_samples(shared_data, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shared_data))
    train, val = load_records("acdc_scribble_train"), load_records("acdc_val")
    assert len(train) == 228 and len(val) == 60 and len({record["volume_id"] for record in val}) == 6
