"""Held-out images are not trained on, and their strokes say how good the model is where nobody drew a mask."""

import json
import re
import shutil

import pytest

from blpseg.config import get_cfg
from blpseg.data.build import build_train_loader
from blpseg.data.datasets import load_records, register_datasets, split_records

from .test_failures import fails


def images_of(config_file, *options):
    """Names trained on in the first 12 batches, and names held out."""
    cfg = get_cfg(str(config_file), [str(o) for o in options])
    register_datasets(cfg)
    batches = zip(build_train_loader(cfg), range(12), strict=False)
    return {x["image_id"] for batch, _ in batches for x in batch}, {
        r["image_id"] for r in load_records("tiny_train_held_out")
    }


def test_training_without_masks_prints_the_estimate(door, config_file, data_root, tmp_path):
    root = tmp_path / "data"
    for part in ("images", "scribbles"):
        shutil.copytree(data_root / part, root / part)
    (root / "masks/train").mkdir(parents=True)
    options = ["DATASETS.TEST", "()", "DATASETS.HOLD_OUT", 0.75, "DATASETS.FOLDER.ROOT", root]
    trained_on, held_out = images_of(config_file, *options)
    assert trained_on and held_out and not trained_on & held_out and len(trained_on | held_out) == 10

    some = sorted(held_out)[0]  # a mask of one image is no reason to ask for those of the others
    shutil.copy(data_root / f"masks/train/{some}.png", root / "masks/train")
    run = door(*options, "TEST.WRITE_PREDICTIONS", "True", "OUTPUT_DIR", tmp_path / "out")
    assert run.wait() == 0, run.output
    assert f"only 1 of {len(held_out)} images have a mask" in run.output and "WRITE_PREDICTIONS need" in run.output
    assert "scores are too high" not in run.output
    line = re.search(r"^mIoU estimated from scribbles: ([\d.]+) \(95 % interval [\d.]+ to [\d.]+\)", run.output, re.M)
    results = json.loads((tmp_path / "out/results.json").read_text())["tiny_train_held_out"]["scribbles"]
    assert float(line[1]) == pytest.approx(results["mIoU"], abs=0.051)
    assert (tmp_path / "out/model_best.pth").exists()


def test_images_that_were_trained_on_are_no_held_out_ones(door, tmp_path):
    trained = door("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / "1")
    assert trained.wait() == 0, trained.output
    options = ["DATASETS.TEST", "()", "DATASETS.HOLD_OUT", 0.7, "MODEL.WEIGHTS", tmp_path / "1/model_final.pth"]
    run = door("--eval-only", *options, "TEST.REPORT.ENABLED", "True", "OUTPUT_DIR", tmp_path / "2")
    assert run.wait() == 0, run.output
    assert "tiny_train_held_out: the model is trained on images of it (tiny_train with" in run.output


def test_two_processes_estimate_what_one_does(door, tmp_path):
    options = ["DATASETS.TEST", "('tiny_train',)", "TEST.SCRIBBLE_ESTIMATE", "True", "SOLVER.MAX_ITER", 1]
    trained = door(*options, "OUTPUT_DIR", tmp_path / "1")
    assert trained.wait() == 0, trained.output
    assert "tiny_train: the model is trained on images of it" in trained.output
    table = trained.output[trained.output.index("tiny_train, ") :]
    head = re.search(r"^class.*$", table, re.M)[0]
    assert re.split(r"\s{2,}", head.strip()) == ["class", "IoU", "ACC", "IoU, scribbles"]
    results = json.loads((tmp_path / "1/results.json").read_text())["tiny_train"]
    row = re.search(r"^background +(.*)$", table, re.M)[1].split()
    expected = [results["sem_seg"]["IoU-background"], results["scribbles"]["IoU-background"]]
    assert [float(row[0]), float(row[2])] == pytest.approx(expected, abs=0.006)
    weights = ["MODEL.WEIGHTS", tmp_path / "1/model_final.pth"]
    again = door("--num-gpus", 2, "--eval-only", *options, *weights, "OUTPUT_DIR", tmp_path / "2")
    assert again.wait() == 0, again.output
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["tiny_train"] for name in "12")
    assert set(one) == set(two) == {"sem_seg", "scribbles"}
    for task in one:
        assert two[task] == pytest.approx(one[task], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(("share", "word"), [("1e-9", "holds out none"), ("0.9", "leaves no image")])
def test_impossible_shares_end_in_one_line(door, config_file, data_root, tmp_path, share, word):
    root = tmp_path / "data"
    names = [r["image_id"] for r in split_records([{"image_id": f"train{k}"} for k in range(10)], 0.9)[1]]
    for part in ("images", "scribbles"):
        (root / part / "train").mkdir(parents=True)
        for name in names:
            shutil.copy(data_root / part / f"train/{name}.png", root / part / "train")
    options = ["DATASETS.TEST", "()", "DATASETS.HOLD_OUT", share, "DATASETS.FOLDER.ROOT", root]
    assert word in fails(door(*options, "OUTPUT_DIR", tmp_path / "out"))
