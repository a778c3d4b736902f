"""Several processes, and parts of a batch one after the other, compute what one process computes at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .door import ROOT
from .test_lost_nothing import descendants, losses, weights

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


@pytest.mark.parametrize(
    ("fault", "words"),
    [("raise RuntimeError('planted')", "planted"), ("import os; os.kill(os.getpid(), 9)", "killed by signal 9")],
)
def test_failure_of_one_process_ends_all_with_one_line(door, tmp_path, fault, words):
    prelude = """
import blpseg.engine.trainer as trainer
from detectron2.utils import comm
step = trainer.Trainer.run_step
def fail(self):
    if self.iter == 2 and comm.get_rank() == 1:
        FAULT
    return step(self)
trainer.Trainer.run_step = fail
""".replace("FAULT", fault)
    run = door("--num-gpus", 2, "OUTPUT_DIR", tmp_path / "out", prelude=prelude)
    assert run.wait() == 1
    (line,) = run.errors()
    assert words in line
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


WAITING = ["--num-machines", 2, "--machine-rank", 1, "--dist-url", "tcp://127.0.0.1:9"]  # nobody is there


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("processes", [1, 2])
def test_signal_while_another_machine_is_waited_for(door, tmp_path, signum, processes):
    run = door("--num-gpus", processes, *WAITING, "OUTPUT_DIR", tmp_path, prelude="print('started', flush=True)")
    run.wait_for("started")
    time.sleep(1)  # into the waiting, or on the way to it: either must do
    run.send(signum)
    assert run.wait() == 128 + signum, run.output
    assert not run.errors() and "Traceback" not in run.output


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.2, 0.4, 0.8])
def test_early_signal(door, tmp_path, delay):
    run = door("--num-gpus", 2, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 100000, prelude=STARTED)
    run.wait_for("installed")
    time.sleep(delay)
    run.send(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.output
    assert not run.errors() and "Traceback" not in run.output


STARTED = """
from blpseg.engine.interrupt import STOP
install = type(STOP).install
def announced(self):
    install(self)
    print("installed", flush=True)
type(STOP).install = announced
"""


def test_frozen_process_does_not_hold_up_the_end(door, tmp_path):
    prelude = "import blpseg.engine.processes as processes; processes.STOP_S = 3.0"
    run = door("--num-gpus", 2, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 100000, prelude=prelude)
    run.wait_for("iter 3/")
    first = descendants(run.pid)[0]
    os.kill(first, signal.SIGSTOP)
    run.send(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.output


def test_closed_terminal_saves(door, tmp_path):
    run = door("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 100000)
    run.wait_for("iter 3/")
    run.send(signal.SIGHUP)
    assert run.wait() == 128 + signal.SIGHUP, run.output
    assert len(list(tmp_path.glob("model_0*.pth"))) == 1
    prelude = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # what `nohup` does
    run = door("--resume", "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 100000, prelude=prelude)
    run.wait_for("continuing after")
    run.send(signal.SIGHUP)
    at = len(run.output)
    run.wait_until(lambda: "iter " in run.output[at:])
    run.send(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1"),
        ({"RANK": "first", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=first"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=-1"),
    ],
)
def test_environment_of_torchrun(door, tmp_path, changes, words):
    run = door("OUTPUT_DIR", tmp_path, prelude=f"import os; os.environ.update({changes!r})")
    assert run.wait() == 1
    (line,) = run.errors()
    assert words in line


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_machine_listens_to_nobody_else(door, tmp_path):
    run = door("--num-gpus", 2, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 100000)
    run.wait_for("iter 2/")
    addresses = set()
    for pid in [run.pid, *descendants(run.pid)]:
        sockets = {os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if f.is_symlink() and f.exists()}
        for table in ("tcp", "tcp6"):
            for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = row.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:  # listening
                    addresses.add(fields[1].rpartition(":")[0])
    run.kill_all()
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert addresses <= loopback, addresses
