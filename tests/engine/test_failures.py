"""Planted faults through the command line: one line that names the remedy, status 1, and nothing lost."""

from __future__ import annotations

import errno
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

from .door import ROOT, Run

NAN_AT = """
import torch
from blpseg.modeling.blpseg import BLPSeg
from detectron2.utils.events import get_event_storage
losses = BLPSeg.compute_losses
def planted(self, *args):
    result = losses(self, *args)
    if get_event_storage().iter == {iteration}:
        result["loss_seg"] = result["loss_seg"] * {value}
    return result
BLPSeg.compute_losses = planted
"""


def fails(run: Run) -> str:
    """The one line of error of a run that must fail."""
    status = run.wait()
    assert status == 1, run.output
    assert "Traceback" not in run.output
    (line,) = run.errors()
    return line


@pytest.mark.parametrize("processes", [1, 2])
def test_nan_stops_with_a_dump_that_repeats_the_step(door, tmp_path, processes):
    folder = tmp_path / "out"
    prelude = NAN_AT.format(iteration=4, value="float('nan')")
    line = fails(door("--num-gpus", processes, "OUTPUT_DIR", folder, prelude=prelude))
    dumps = sorted(folder.glob("dump_iter0000004_rank*.pth"))
    assert len(dumps) == processes
    assert "iteration 4" in line and "loss_seg" in line and "train" in line and f"--replay {folder}/dump" in line
    dump = torch.load(dumps[0], weights_only=True)
    assert len(dump["batch"]) == 4 // processes and all(x["file_name"] in line for x in dump["batch"]) or processes > 1
    # The weights are those from before the step: the checkpoint after iteration 2 plus step 3, and finite.
    assert all(torch.isfinite(v).all() for v in dump["model"].values())

    run = door("--replay", dumps[0], prelude=prelude)
    assert run.wait() == 3, run.output
    assert "loss_seg nan" in run.output and "the step is not finite" in run.output
    run = door("--replay", dumps[0])
    assert run.wait() == 0, run.output
    assert "the step is finite here" in run.output


def test_replay_repeats_the_losses(door, tmp_path):
    """Infinite only by the planted factor, so the replay without it must print the loss that the calm run logged."""
    calm, folder = tmp_path / "calm", tmp_path / "out"
    assert door("OUTPUT_DIR", calm, "DATASETS.TEST", "()").wait() == 0
    fails(door("OUTPUT_DIR", folder, prelude=NAN_AT.format(iteration=3, value="float('inf')")))
    run = door("--replay", folder / "dump_iter0000003_rank0.pth")
    assert run.wait() == 0, run.output
    from .test_lost_nothing import losses

    printed = sum(float(part.split()[1]) for part in run.output.split("losses: ")[1].splitlines()[0].split(", "))
    assert printed == pytest.approx(dict(losses(calm))[3], rel=1e-5)


NAN_GRADIENT = """
import torch
from blpseg.modeling.blpseg import BLPSeg
losses = BLPSeg.compute_losses
def planted(self, outputs, *args):
    logits = outputs.logits
    return losses(self, outputs._replace(logits=logits + 0 * torch.sqrt(logits - logits)), *args)
BLPSeg.compute_losses = planted
"""


def test_nan_gradient_stops_before_it_reaches_the_weights(door, tmp_path):
    line = fails(door("OUTPUT_DIR", tmp_path / "out", prelude=NAN_GRADIENT))
    assert "iteration 0: the gradient became NaN" in line


def test_gradient_scaler_does_not_skip_steps_for_ever(door, tmp_path):
    prelude = (
        NAN_GRADIENT
        + """
scaler = torch.amp.GradScaler
torch.amp.GradScaler = lambda device, enabled: scaler(device, enabled=True)
"""
    )
    line = fails(door("OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", 60, prelude=prelude))
    assert "iteration 50: the gradient became NaN" in line


def test_gpus_are_not_chosen_by_index(door, tmp_path):
    line = fails(door("OUTPUT_DIR", tmp_path / "out", "MODEL.DEVICE", "cuda:1"))
    assert "MODEL.DEVICE cuda:1" in line and "CUDA_VISIBLE_DEVICES=1" in line


def test_out_of_memory_names_the_keys(door, tmp_path):
    prelude = """
import torch
from blpseg.modeling.blpseg import BLPSeg
def greedy(self, *args):
    torch.empty(1 << 50)
BLPSeg.compute_losses = greedy
"""
    line = fails(door("OUTPUT_DIR", tmp_path / "out", prelude=prelude))
    for key in ("SOLVER.IMS_PER_BATCH (4)", "INPUT.CROP.SIZE ([32, 32])", "SOLVER.ACCUMULATION_STEPS (1)", "LAM.IMPL"):
        assert key in line


def test_dead_loader_worker_names_the_sample(door, tmp_path):
    prelude = """
import os, signal
from blpseg.data.dataset_mapper import ScribbleDatasetMapper
call = ScribbleDatasetMapper.__call__
def fatal(self, record, *args):
    if record["file_name"].endswith("train3.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, record, *args)
ScribbleDatasetMapper.__call__ = fatal
"""
    line = fails(door("OUTPUT_DIR", tmp_path / "out", "DATALOADER.NUM_WORKERS", 2, prelude=prelude))
    assert "train3.png" in line and "loader worker" in line


def test_bad_sample_is_one_line_from_a_worker_too(door, tmp_path, data_root):
    broken = data_root / "broken"
    if not broken.exists():
        import shutil

        for part in ("images", "masks", "scribbles"):
            shutil.copytree(data_root / part, broken / part)
        (broken / "images" / "train" / "train2.png").write_bytes(b"no image")
    for workers in (0, 2):
        options = ["DATALOADER.NUM_WORKERS", workers, "DATASETS.FOLDER.ROOT", broken]
        line = fails(door("OUTPUT_DIR", tmp_path / f"out{workers}", *options))
        assert "train2.png" in line


def test_batch_norm_on_one_image(door, tmp_path):
    line = fails(door("OUTPUT_DIR", tmp_path / "out", "SOLVER.ACCUMULATION_STEPS", 4))
    assert "at least 2 images" in line and "SOLVER.ACCUMULATION_STEPS 4" in line


def test_output_dir_of_another_experiment(door, tmp_path):
    folder = tmp_path / "out"
    assert door("OUTPUT_DIR", folder, "DATASETS.TEST", "()").wait() == 0
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}
    line = fails(door("OUTPUT_DIR", folder, "DATASETS.TEST", "()"))
    assert str(folder) in line and "--resume" in line and "--overwrite" in line
    line = fails(door("OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.BASE_LR", 0.1))
    assert "another experiment (SOLVER.BASE_LR: 0.003 -> 0.1)" in line
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"} == before
    run = door("--overwrite", "OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2)
    assert run.wait() == 0, run.output
    assert [p.name for p in folder.glob("model_0*")] == ["model_0000001.pth"]


def test_two_runs_in_one_output_dir(door, tmp_path):
    folder = tmp_path / "out"
    first = door("OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 100000)
    first.wait_for("iter 2/")
    for flag in ("--resume", "--overwrite"):
        assert "another process trains in it" in fails(door(flag, "OUTPUT_DIR", folder))
    first.kill_all()


def test_racing_starts(door, tmp_path):
    """Of three runs started at once in one folder, one trains and the others say so."""
    runs = [door("OUTPUT_DIR", tmp_path / "out", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3) for _ in range(3)]
    assert sorted(run.wait() for run in runs) == [0, 1, 1]
    (winner,) = [run for run in runs if run.wait() == 0]
    assert "iter 3/3" in winner.output
    for run in runs:
        if run is not winner:
            assert str(tmp_path / "out") in fails(run) and "iter 1/" not in run.output


RESIDENT = """
import resource
import blpseg.engine.trainer as trainer
step, seen = trainer.Trainer.run_step, []
def measured(self):
    step(self)
    if self.iter in (19, 79):
        seen.append(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20)
        print(f"grew {seen[-1] - seen[0]:.2f} MiB", flush=True)
trainer.Trainer.run_step = measured
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat(door, tmp_path):
    """Over 60 iterations. What a step leaves behind, of its images or graph, is 200 KiB or more."""
    options = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", 80, "OUTPUT.LOG_PERIOD", 20]
    run = door("OUTPUT_DIR", tmp_path / "out", *options, prelude=RESIDENT)
    assert run.wait() == 0, run.output
    assert float(re.findall(r"grew (\S+) MiB", run.output)[-1]) < 8


def test_resume_reports_changed_keys_and_extends(door, tmp_path):
    folder = tmp_path / "out"
    assert door("OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 4).wait() == 0
    run = door("--resume", "OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 6)
    assert run.wait() == 0, run.output
    assert "SOLVER.MAX_ITER: 4 -> 6" in run.output and "iter 6/6" in run.output
    line = fails(door("--resume", "OUTPUT_DIR", folder, "MODEL.BLPSEG.HEAD_CHANNELS", 12, "SOLVER.MAX_ITER", 8))
    assert "model_0000005.pth" in line and "does not fit this config" in line


def test_config_typo_lists_near_matches(door, tmp_path):
    assert "SOLVER.IMS_PER_BATCH" in fails(door("OUTPUT_DIR", tmp_path / "out", "SOLVER.IMS_PER_BACH", 4))


def test_eval_only_needs_weights_of_a_trained_model(door, tmp_path):
    assert "MODEL.WEIGHTS" in fails(door("--eval-only", "OUTPUT_DIR", tmp_path / "out"))
    backbone = tmp_path / "backbone.pth"
    torch.save({"backbone.res2.weight": torch.zeros(8, 3, 3, 3)}, backbone)
    line = fails(door("--eval-only", "OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", backbone))
    assert str(backbone) in line and "lacks" in line


@pytest.mark.slow
def test_wrong_class_count(door, tmp_path):
    folder = tmp_path / "out"
    assert door("OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2).wait() == 0
    options = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4, "DATASETS.FOLDER.CLASSES", "['background','disc','square','star']"]
    weights = ["MODEL.WEIGHTS", folder / "model_final.pth"]
    for more in ([], ["--eval-only"]):
        line = fails(door(*more, "OUTPUT_DIR", tmp_path / "other", *options, *weights))
        assert "model_final.pth: made for 3 classes" in line and "NUM_CLASSES 4" in line
    options += [*weights, "MODEL.BLPSEG.RESET_CLASS_LAYERS", True, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()"]
    run = door("OUTPUT_DIR", tmp_path / "other", *options)
    assert run.wait() == 0, run.output


def test_full_disk(config_file, tmp_path):
    """A file system that takes two checkpoints, but not a third beside them, in an interpreter of its own."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(mount)], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    folder = mount / "out"
    command = [sys.executable, "-W", "ignore", "-m", "tests.engine.door", "--config-file", str(config_file)]
    command += ["OUTPUT_DIR", str(folder), "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "10000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert result.returncode == 1, result.stdout + result.stderr
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and os.strerror(errno.ENOSPC) in line and str(folder / "model_") in line
        kept = sorted(folder.glob("model_0*.pth"))
        assert kept and all("optimizer" in torch.load(path, weights_only=True) for path in kept)
        assert not list(folder.glob(".*.tmp"))
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize(("period", "name"), [(3, "model_0000002.pth"), (1000000, "")])
def test_file_size_limit(door, tmp_path, period, name):
    """The same through a quota that any user may set: a checkpoint exceeds it, or else the growing logs do."""
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    folder = tmp_path / "out"
    options = ["SOLVER.CHECKPOINT_PERIOD", period, "SOLVER.MAX_ITER", 10000, "DATASETS.TEST", "()"]
    line = fails(door("OUTPUT_DIR", folder, *options, prelude=prelude))
    assert os.strerror(errno.EFBIG) in line and str(folder / name) in line
    assert not list(folder.glob(".*.tmp")) and not list(folder.glob("model_*"))


def test_debug_shows_the_traceback(door, tmp_path):
    run = door("--debug", "OUTPUT_DIR", tmp_path / "out", "SOLVER.ACCUMULATION_STEPS", 4)
    assert run.wait() == 1
    assert "Traceback" in run.output and run.errors()


def test_help():
    text = runpy.run_path(str(ROOT / "tools" / "train_net.py"))["parser"]().format_help()
    flags = ["--config-file", "--num-gpus", "--num-machines", "--machine-rank", "--dist-url", "--resume", "--eval-only"]
    flags += ["KEY VALUE", "--trust-checkpoint", "--overwrite", "--replay", "--debug"]
    assert all(flag in text for flag in flags)
