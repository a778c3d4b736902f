"""Projects of own photos: what `tools/new_project.py` makes, and README's commands on it."""

import cv2
import pytest

from blpseg.data.project import create_project
from blpseg.utils.errors import BLPSegError
from blpseg.utils.palette import distinct_colors
from blpseg.utils.yaml_files import read_config

SMALL = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.BLPSEG.HEAD_CHANNELS", "16", "INPUT.CROP.SIZE", "[32, 32]",
         "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "1", "OUTPUT.PANEL_PERIOD", "0"]  # fmt: skip


def test_readme_commands_on_a_new_project(made_folder, tmp_path, run_tool, monkeypatch, capfd):
    project, config = tmp_path / "my photos", str(tmp_path / "my photos/config.yaml")
    for name in ("train0", "train1"):  # photos with a mask, for validation
        (made_folder / "given").mkdir(exist_ok=True)
        (made_folder / f"masks/train/{name}.png").rename(made_folder / f"given/{name}.png")
    (made_folder / "scribbles/train/train5.png").unlink()  # not scribbled yet
    monkeypatch.chdir(tmp_path)
    new = [str(project), "--images", str(made_folder / "images/train"), "--classes", "background", "apple", "pear",
           "--scribbles", str(made_folder / "scribbles/train"), "--masks", str(made_folder / "given")]  # fmt: skip
    assert run_tool("tools/new_project.py", *new) == 0
    assert "4 photos to scribble on, 3 classes" in capfd.readouterr().out
    assert run_tool("tools/new_project.py", *new) == 1 and "this project exists" in capfd.readouterr().err
    look = ["--source", "annotation", "--output-dir", str(tmp_path / "look")]
    assert run_tool("tools/visualize_data.py", "--config-file", config, *look) == 0
    assert len(list((tmp_path / "look").glob("*.png"))) == 4
    assert run_tool("tools/train_net.py", "--config-file", config, *SMALL) == 0
    assert (project / "models/model_final.pth").is_file()
    assert "mIoU" in capfd.readouterr().out
    predict = ["--raw", "--output", str(tmp_path / "masks"), "--opts", *SMALL]
    photo = str(project / "images/train/train5.jpg")
    weights = ["MODEL.WEIGHTS", str(project / "models/model_final.pth")]
    assert run_tool("tools/demo.py", "--config-file", config, "--input", photo, *predict, *weights) == 0
    (mask,) = (tmp_path / "masks").glob("*_raw.png")
    assert cv2.imread(str(mask), cv2.IMREAD_UNCHANGED).shape[:2] == cv2.imread(photo).shape[:2]


def test_choice_of_the_validation_photos(made_folder, tmp_path):
    images, classes = made_folder / "images/train", ["background", "thing"]
    assert create_project(tmp_path / "a", classes, images, val=2, seed=1) == 4
    assert len(list((tmp_path / "a/images/val").iterdir())) == 2
    assert read_config(tmp_path / "a/config.yaml")["DATASETS"]["TEST"] == "()"  # no mask is there yet
    with pytest.raises(BLPSegError, match="all 6 photos would be for validation"):
        create_project(tmp_path / "b", classes, images, masks=made_folder / "masks/train")
    with pytest.raises(BLPSegError, match="has the same stem"):
        (images / "train0.png").write_bytes((images / "train0.jpg").read_bytes())
        create_project(tmp_path / "b", classes, images)
    assert not (tmp_path / "b").exists()


def test_files_that_are_no_photos_are_named(made_folder, tmp_path, caplog):
    for name in ("moving.gif", "notes.txt", ".hidden"):
        (made_folder / "images/train" / name).write_bytes(b"x")
    assert create_project(tmp_path / "a", ["background", "thing"], made_folder / "images/train") == 6
    assert "2 other files are left out (moving.gif, notes.txt); photos are .jpg" in caplog.text


@pytest.mark.parametrize("classes", [["one"], ["a", "a"], ["a", ""], ["a", "b\n"], ["a", "x" * 101]])
def test_class_names(tmp_path, made_folder, classes):
    with pytest.raises(BLPSegError, match="--classes: "):
        create_project(tmp_path / "p", classes, made_folder / "images/train")


def test_colors_are_apart_and_stay_when_classes_are_added():
    assert distinct_colors(20)[:8] == distinct_colors(8)
    assert len(set(distinct_colors(254))) == 254


def test_scribbles_of_no_photo(made_folder, tmp_path, caplog):
    images, scribbles = made_folder / "images/train", made_folder / "scribbles/train"
    create_project(tmp_path / "some", ["a", "b", "c"], images, scribbles=scribbles, val=2)
    copied = list((tmp_path / "some/scribbles/train").iterdir())
    assert len(copied) == 4 and "4 of 6 scribbles are copied; their photos are for validation" in caplog.text
    for path in list(scribbles.iterdir()):
        path.rename(scribbles / f"{path.stem}_scribble.png")
    with pytest.raises(BLPSegError, match="holds no scribble with the stem of a photo"):
        create_project(tmp_path / "none", ["a", "b", "c"], images, scribbles=scribbles)
    with pytest.raises(BLPSegError, match="does not keep class numbers"):
        create_project(tmp_path / "photos", ["a", "b", "c"], images, scribbles=images)
    with pytest.raises(BLPSegError, match="no commas"):
        create_project(tmp_path / "commas", ["a,", "b"], images)
    assert not (tmp_path / "none").exists() and not (tmp_path / "photos").exists()
