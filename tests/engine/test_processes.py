"""Several processes, and parts of a batch one after the other, compute what one process computes at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from .door import ROOT
from .test_lost_nothing import losses, weights

# Frozen batch norm and no dropout: what is left must not depend on how a batch is shared out.
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.SEM_SEG_HEAD.NORM", "FrozenBN"]
FROZEN += ["MODEL.BLPSEG.DECODER.DROPOUT", "0.0"]


@pytest.fixture
def single(door, tmp_path):
    """Final weights and losses of one process with whole batches."""
    folder = tmp_path / "single"
    run = door(*FROZEN, "DATASETS.TEST", "()", "OUTPUT_DIR", folder)
    assert run.wait() == 0, run.output
    return folder


@pytest.mark.parametrize(
    "options", [["--num-gpus", 2], ["SOLVER.ACCUMULATION_STEPS", 3], ["--num-gpus", 2, "SOLVER.ACCUMULATION_STEPS", 2]]
)
def test_same_as_one_process(door, tmp_path, single, options):
    folder = tmp_path / "shared_out"
    run = door(*FROZEN, "DATASETS.TEST", "()", "OUTPUT_DIR", folder, *options)
    assert run.wait() == 0, run.output
    # AdamW divides by the gradient's own size, so a rounding error of a tiny gradient shows at full step length.
    expected = weights(single)
    start = torch.cat([v.flatten() for v in expected.values()])
    other = torch.cat([v.flatten() for v in weights(folder).values()])
    assert (start - other).abs().quantile(0.99) < 1e-5
    for (i, a), (j, b) in zip(losses(single), losses(folder), strict=True):
        assert i == j and a == pytest.approx(b, rel=2e-4)
    # The first step, before errors can grow: exact to rounding.
    assert losses(single)[0][1] == pytest.approx(losses(folder)[0][1], rel=1e-6)


def test_evaluation_is_the_same_with_two_processes(door, tmp_path):
    folder = tmp_path / "out"
    run = door("--num-gpus", 2, "OUTPUT_DIR", folder)  # plain batch norm: the processes' statistics differ
    assert run.wait() == 0, run.output
    (trained,) = re.findall(r"^mIoU: (\S+)$", run.output, re.M)
    (entry,) = json.loads((folder / "evaluations.json").read_text())
    assert entry["mIoU"] == pytest.approx(float(trained), abs=1e-3)
    for processes in (1, 2):
        options = ["MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path / "eval"]
        run = door("--eval-only", "--num-gpus", processes, *options)
        assert run.wait() == 0, run.output
        assert re.findall(r"^mIoU: (\S+)$", run.output, re.M) == [trained]
        assert "copypaste: mIoU," in run.output


def test_failure_of_one_process_ends_all_with_one_line(door, tmp_path):
    prelude = """
import blpseg.engine.trainer as trainer
from detectron2.utils import comm
step = trainer.Trainer.run_step
def fail(self):
    if self.iter == 2 and comm.get_rank() == 1:
        raise RuntimeError("planted")
    return step(self)
trainer.Trainer.run_step = fail
"""
    run = door("--num-gpus", 2, "OUTPUT_DIR", tmp_path / "out", prelude=prelude)
    assert run.wait() == 1
    (line,) = run.errors()
    assert "planted" in line
    assert "Traceback" not in run.output


def test_torchrun(config_file, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "tests.engine.door"]
    command += ["--config-file", str(config_file), "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 process(es) on cpu" in result.stdout
    assert (tmp_path / "out" / "model_final.pth").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-gpus", 3], "SOLVER.IMS_PER_BATCH 4"),
        (["--num-gpus", 2, "SOLVER.ACCUMULATION_STEPS", 3], "SOLVER.ACCUMULATION_STEPS 3"),
        (["--num-gpus", 0], "--num-gpus 0"),
        (["--num-machines", 2], "--dist-url"),
    ],
)
def test_settings_that_cannot_work(door, tmp_path, options, words):
    run = door(*options, "OUTPUT_DIR", tmp_path / "out")
    assert run.wait() == 1
    (line,) = run.errors()
    assert words in line
