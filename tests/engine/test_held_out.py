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
    options = ["DATASETS.TEST", "()", "DATASETS.HOLD_OUT", 0.4, "DATASETS.FOLDER.ROOT", root]
    trained_on, held_out = images_of(config_file, *options)
    assert trained_on and held_out and not trained_on & held_out and len(trained_on | held_out) == 10

    run = door(*options, "OUTPUT_DIR", tmp_path / "out")
    assert run.wait() == 0, run.output
    line = re.search(r"^mIoU estimated from scribbles: ([\d.]+) \(95 % interval [\d.]+ to [\d.]+\)", run.output, re.M)
    results = json.loads((tmp_path / "out/results.json").read_text())["tiny_train_held_out"]["scribbles"]
    assert float(line[1]) == pytest.approx(results["mIoU"], abs=0.051)
    assert (tmp_path / "out/model_best.pth").exists()


def test_two_processes_estimate_what_one_does(door, tmp_path):
    options = ["DATASETS.TEST", "('tiny_train',)", "TEST.SCRIBBLE_ESTIMATE", "True", "SOLVER.MAX_ITER", 1]
    trained = door(*options, "OUTPUT_DIR", tmp_path / "1")
    assert trained.wait() == 0, trained.output
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
