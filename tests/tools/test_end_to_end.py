"""The newcomer's path through the commands: make data, train, resume, evaluate, picture; and the usual mistakes."""

import json
import os
import subprocess
import sys

import cv2
import pytest

CONFIG = "configs/Synthetic-Scribble/blpseg_tiny.yaml"
SMALL = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.BLPSEG.HEAD_CHANNELS", "16", "INPUT.CROP.SIZE", "[32, 32]",
         "SOLVER.IMS_PER_BATCH", "2", "OUTPUT.LOG_PERIOD", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def command(root, tmp_path_factory):
    """``command(script, *arguments)`` runs a script of ours in a process with a generated data root."""
    data = tmp_path_factory.mktemp("data")
    environment = os.environ | {"DETECTRON2_DATASETS": str(data), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment.pop("BLPSEG_DEBUG", None)

    def run(script, *arguments, **changes):
        return subprocess.run(
            [sys.executable, "-W", "ignore", str(root / script), *map(str, arguments)],
            capture_output=True, text=True, cwd=root, env=environment | changes,
        )  # fmt: skip

    made = run("datasets/make_synthetic.py", "--train", 6, "--val", 3, "--size", 48)
    assert made.returncode == 0, made.stderr
    return run


def test_train_resume_evaluate_picture(command, tmp_path):
    out = tmp_path / "out"
    opts = [*SMALL, "OUTPUT_DIR", out]
    trained = command("tools/train_net.py", "--config-file", CONFIG, *opts, "SOLVER.MAX_ITER", 2)
    assert trained.returncode == 0, trained.stderr
    assert "mIoU: " in trained.stdout
    resumed = command("tools/train_net.py", "--config-file", CONFIG, "--resume", *opts, "SOLVER.MAX_ITER", 4)
    assert resumed.returncode == 0, resumed.stderr
    iterations = [json.loads(line)["iteration"] for line in (out / "metrics.json").read_text().splitlines()]
    assert {0, 1, 2, 3} <= set(iterations), "the second run goes on where the first ended"
    weights = ["MODEL.WEIGHTS", out / "model_final.pth"]
    evaluated = command("tools/train_net.py", "--config-file", CONFIG, "--eval-only", *opts, *weights)
    assert evaluated.returncode == 0, evaluated.stderr
    last = [line for line in resumed.stdout.splitlines() if line.startswith("mIoU: ")][-1]
    assert last in evaluated.stdout, "the checkpoint evaluates to what the training run said"
    pictures = command(
        "tools/demo.py", "--config-file", CONFIG, "--dataset", "synthetic_scribble_train", "--panels", "--limit", 1,
        "--output", tmp_path / "pictures", "--opts", *SMALL, *weights,
    )  # fmt: skip
    assert pictures.returncode == 0, pictures.stderr
    (panel,) = (tmp_path / "pictures").glob("*_panels.png")
    assert cv2.imread(str(panel)).std() > 10


def test_missing_data_root_is_one_line(command, tmp_path):
    arguments = ["--config-file", CONFIG, *SMALL, "OUTPUT_DIR", tmp_path / "out"]
    result = command("tools/train_net.py", *arguments, DETECTRON2_DATASETS="/nowhere")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "/nowhere" in line and "make_synthetic.py" in line
