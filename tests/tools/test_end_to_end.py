"""The newcomer's path through the commands: make data, train, resume, evaluate, picture; and the usual mistakes."""

import json
import os
import subprocess
import sys

import cv2
import pytest

from ..test_imports import RUN_SCRIPT

CONFIG = "configs/Synthetic-Scribble/blpseg_tiny.yaml"
SMALL = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.BLPSEG.HEAD_CHANNELS", "16", "INPUT.CROP.SIZE", "[32, 32]",
         "SOLVER.IMS_PER_BATCH", "2", "OUTPUT.LOG_PERIOD", "1"]  # fmt: skip


@pytest.fixture
def command(root, tmp_path, run_tool, monkeypatch, capfd):
    """``command(script, *arguments)`` runs a script of ours with a generated data root; what it printed."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    monkeypatch.delenv("BLPSEG_DEBUG", raising=False)
    monkeypatch.chdir(root)

    def run(script, *arguments, status=0):
        found = run_tool(script, *map(str, arguments))
        printed = capfd.readouterr()
        assert found == status, printed.err
        return printed

    run("datasets/make_synthetic.py", "--train", 6, "--val", 3, "--size", 48)
    return run


def test_train_resume_evaluate_picture(command, root, tmp_path):
    """The training in an interpreter of its own, which shows what a start loads: no more than it needs."""
    out = tmp_path / "out"
    opts = [*SMALL, "OUTPUT_DIR", out]
    words = ["tools/train_net.py", "--config-file", CONFIG, *opts, "SOLVER.MAX_ITER", 2, "OUTPUT.PANEL_PERIOD", 0]
    words += ["DATASETS.TEST", "()"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    first = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_SCRIPT, *map(str, words)],
        capture_output=True, text=True, cwd=root, env=environment,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    loaded = first.stdout.rpartition("loaded: ")[2].split()
    assert "torch" in loaded and not {"timm", "sympy", "matplotlib", "pandas"} & {*loaded}
    resumed = command("tools/train_net.py", "--config-file", CONFIG, "--resume", *opts, "SOLVER.MAX_ITER", 4).out
    iterations = [json.loads(line)["iteration"] for line in (out / "metrics.json").read_text().splitlines()]
    assert {0, 1, 2, 3} <= set(iterations), "the second run goes on where the first ended"
    weights = ["MODEL.WEIGHTS", out / "model_final.pth"]
    evaluated = command("tools/train_net.py", "--config-file", CONFIG, "--eval-only", *opts, *weights).out
    last = [line for line in resumed.splitlines() if line.startswith("mIoU: ")][-1]
    assert last in evaluated, "the checkpoint evaluates to what the training run said"
    command(
        "tools/demo.py", "--config-file", CONFIG, "--dataset", "synthetic_scribble_train", "--panels", "--limit", 1,
        "--output", tmp_path / "pictures", "--opts", *SMALL, *weights,
    )  # fmt: skip
    (panel,) = (tmp_path / "pictures").glob("*_panels.png")
    assert cv2.imread(str(panel)).std() > 10


def test_missing_data_root_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/nowhere")
    arguments = ["--config-file", CONFIG, *SMALL, "OUTPUT_DIR", tmp_path / "out"]
    printed = command("tools/train_net.py", *arguments, status=1).err
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "/nowhere" in line and "make_synthetic.py" in line
