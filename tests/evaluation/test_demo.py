"""The demo: through the command line on images, in the process on a video."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from blpseg import Predictor, get_cfg
from blpseg.evaluation.demo import Demo, dataset_images, find_images
from blpseg.utils.errors import BLPSegError

from .toys import make_image

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/Synthetic-Scribble/blpseg_tiny.yaml")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    cfg = get_cfg(CONFIG, ["MODEL.WEIGHTS", str(path)])
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, path)
    return cfg


def test_images_from_the_command_line(cfg, tmp_path, run_tool, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(make_image(1, 48, 64)).save(tmp_path / folder / "street.png")
    Image.fromarray(make_image(2, 40, 40)).save(tmp_path / "b" / "grey.jpg")
    (tmp_path / "b" / "broken.png").write_bytes(b"no picture")
    output = tmp_path / "out"
    arguments = ["--config-file", CONFIG, "--output", str(output), "--raw", "--panels"]
    arguments += ["--input", str(tmp_path / "a/street.png"), str(tmp_path / "b"), "--opts", "MODEL.WEIGHTS"]
    assert run_tool("tools/demo.py", *arguments, cfg.MODEL.WEIGHTS) == 1  # one of the four is broken
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "broken.png" in errors[0]
    assert "Traceback" not in printed.err and "3 of 4" in printed.out
    names = [f"{name}{suffix}.png" for name in ("grey", "street", "street_2") for suffix in ("", "_panels", "_raw")]
    assert sorted(path.name for path in output.iterdir()) == sorted(names)

    classes = np.array(Image.open(output / "street_raw.png"))
    expected = Predictor(cfg)(tmp_path / "a/street.png")["sem_seg"]
    assert (classes == expected).mean() > 0.999  # two processes, so perhaps not the last bit
    np.testing.assert_array_equal(cv2.imread(str(output / "street_raw.png"), -1), classes)  # grey: numbers for all
    picture = np.array(Image.open(output / "street.png"))
    assert picture.shape[0] > picture.shape[1] * 48 / 64 and picture.shape[2] == 3  # the legend is below


def test_a_checkpoint_alone_is_enough(cfg, tmp_path, run_tool, capsys):
    """Its folder data set is gone, so that the names come from the checkpoint; --plain is the photo's size."""
    state = torch.load(cfg.MODEL.WEIGHTS)
    other = cfg.clone()
    other.DATASETS.FOLDER.NAME, other.DATASETS.FOLDER.ROOT = "gone", str(tmp_path / "gone")
    other.DATASETS.FOLDER.CLASSES_FILE = "classes.yaml"
    other.DATASETS.TRAIN, other.DATASETS.TEST = ("gone_train",), ("gone_val",)
    names = ["background", "a", "b", "c", "d", "e", "f"]
    torch.save({**state, "config": other.dump(), "class_names": names}, tmp_path / "model.pth")
    Image.fromarray(make_image(1, 48, 64)).save(tmp_path / "street.png")
    arguments = ["--weights", str(tmp_path / "model.pth"), "--output", str(tmp_path / "out"), "--plain", "--raw"]
    arguments += ["--palette", "--input", str(tmp_path / "street.png"), "TEST.AUG.ENABLED", "False"]
    assert run_tool("tools/demo.py", *arguments) == 0
    assert Image.open(tmp_path / "out/street.png").size == (64, 48)
    assert Image.open(tmp_path / "out/street_raw.png").mode == "P"
    assert run_tool("tools/demo.py", "--weights", cfg.MODEL.WEIGHTS, *arguments[2:]) == 1
    assert "holds no config; give the one it was trained with as --config-file" in capsys.readouterr().err


def test_video_keeps_rate_and_length(cfg, tmp_path):
    source = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 12.5, (66, 48))
    for i in range(5):
        writer.write(np.roll(make_image(0, 48, 66), 3 * i, axis=1))
    writer.release()
    demo = Demo(cfg, str(tmp_path / "out"), raw=True)
    path = demo.run_video(str(source))
    assert path == str(tmp_path / "out/clip.mp4")
    capture = cv2.VideoCapture(path)
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    frames = []
    while True:
        found, frame = capture.read()
        if not found:
            break
        frames.append(frame)
    assert len(frames) == 5
    height, width = frames[0].shape[:2]
    assert width == 11 * 66 and height > 11 * 48 and height % 2 == 0  # enlarged, with a legend
    raw = sorted(path.name for path in (tmp_path / "out/clip_raw").iterdir())
    assert raw == [f"{i:06d}.png" for i in range(1, 6)]
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]

    # Ended early, as by Ctrl-C: what was done is kept.
    def stop(frame):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run_video(str(source), preview=stop)
    assert int(cv2.VideoCapture(path).get(cv2.CAP_PROP_FRAME_COUNT)) == 1

    with pytest.raises(BLPSegError, match="nowhere.mp4: no such file"):
        demo.run_video("nowhere.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(BLPSegError, match="text.mp4"):
        demo.run_video(str(tmp_path / "text.mp4"))
    with pytest.raises(BLPSegError, match="would be overwritten"):
        demo.run_video(path)
    # Nor is an image that is read.
    image = tmp_path / "out" / "photo.png"
    Image.fromarray(make_image(0, 40, 40)).save(image)
    before = image.read_bytes()
    assert demo.run_images([{"file_name": str(image)}]) == 1 and image.read_bytes() == before


def test_panels_of_a_data_set_show_its_labels(cfg, dataset, tmp_path):
    dataset(2, scribbles=True)
    other = cfg.clone()
    other.DATASETS.TEST = ("synthetic_val",)
    images = dataset_images("toy_val")
    demo = Demo(other, str(tmp_path / "out"), panels=True)
    assert demo.run_images(images[:1]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["toy_val_img0.png", "toy_val_img0_panels.png"]
    with_labels = np.array(Image.open(tmp_path / "out/toy_val_img0_panels.png")).shape[1]
    demo.run_images([{"file_name": images[0]["file_name"]}])
    without = np.array(Image.open(tmp_path / "out/img0_panels.png")).shape[1]
    assert with_labels > 1.5 * without  # five pictures beside each other, not three


def test_inputs(tmp_path):
    for name in ("b.png", "a.JPG", "note.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.png").touch()
    folder = [str(tmp_path / "a.JPG"), str(tmp_path / "b.png")]
    assert find_images([str(tmp_path)]) == folder
    assert find_images([str(tmp_path / "*.png"), str(tmp_path)]) == [folder[1], folder[0]]
    assert find_images([str(tmp_path / "**/*.png")]) == [folder[1], str(tmp_path / "deep/c.png")]
    assert find_images(["gone.png"]) == ["gone.png"]
    with pytest.raises(BLPSegError, match="no images there"):
        find_images([str(tmp_path / "*.bmp")])


def test_classes_need_names(cfg, tmp_path):
    other = cfg.clone()
    other.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    with pytest.raises(BLPSegError, match="3 classes"):
        Demo(other, str(tmp_path))
