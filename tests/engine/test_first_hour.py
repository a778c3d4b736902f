"""Mistakes of the first hour are found before the first step; what a run says of itself and leaves behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch

from blpseg.checkpoint import Checkpointer
from blpseg.config import get_cfg
from blpseg.engine.output_dir import claim_output_dir, release_output_dir
from blpseg.engine.writers import ProgressWriter, Writers
from blpseg.utils.device import choose_device
from blpseg.utils.errors import BLPSegError

from .test_failures import fails
from .test_lost_nothing import weights


@pytest.fixture
def copied(data_root, tmp_path):
    """A copy of the toy data to spoil."""
    root = tmp_path / "data"
    for part in ("images", "masks", "scribbles"):
        shutil.copytree(data_root / part, root / part)
    return root


def spoil_all(folder, array) -> None:
    for path in folder.iterdir():
        cv2.imwrite(str(path), array)


MASKS = {
    "no folder": (lambda root: shutil.rmtree(root / "images/val"), ["images/val"]),
    "no mask": (lambda root: (root / "masks/val/val3.png").unlink(), ["val3"]),
    "colours": (lambda root: spoil_all(root / "masks/val", np.full((40, 44, 3), [0, 0, 128])), ["colour image"]),
    "size": (lambda root: spoil_all(root / "masks/val", np.zeros((20, 22), np.uint8)), ["22 x 20", "44 x 40"]),
    "void": (
        lambda root: spoil_all(root / "masks/val", np.full((40, 44), 11, np.uint8)),
        ["label 11", "DATASETS.FOLDER.IGNORE_LABEL 11"],
    ),
    "not an image": (lambda root: (root / "masks/val/val4.png").write_bytes(b"none"), ["val4.png"]),
}


@pytest.mark.parametrize("fault", MASKS)
def test_validation_is_checked_before_the_first_step(door, tmp_path, copied, fault):
    spoil, words = MASKS[fault]
    spoil(copied)
    options = ["DATASETS.FOLDER.ROOT", copied, "OUTPUT_DIR", tmp_path / "out"]
    run = door(*options)
    line = fails(run)
    assert all(word in line for word in [*words, 'DATASETS.TEST "()"'])
    assert "iter 1/" not in run.output
    assert door(*options, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1).wait() == 0


def test_final_model_is_there_before_the_evaluation(door, tmp_path):
    prelude = """
import blpseg.engine.trainer as trainer
def broken(*args, **kwargs):
    raise RuntimeError("planted")
trainer.evaluate = broken
"""
    line = fails(door("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 2, prelude=prelude))
    assert "planted" in line and weights(tmp_path)


def test_blank_scribbles(door, tmp_path, copied):
    spoil_all(copied / "scribbles/train", np.full((40, 44), 255, np.uint8))
    line = fails(door("DATASETS.FOLDER.ROOT", copied, "OUTPUT_DIR", tmp_path / "out"))
    assert "nothing is annotated" in line and "the other 9 labels" in line


def test_no_writing_through_links(door, tmp_path):
    """Of a process beside the main one; tests/engine/test_damaged_output.py has the others."""
    folder, other = tmp_path / "out", tmp_path / "other.txt"
    folder.mkdir()
    other.write_text("somebody else's")
    (folder / "log.txt.rank1").symlink_to(other)
    line = fails(door("--num-gpus", 2, "OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2))
    assert "log.txt.rank1" in line and "link" in line and other.read_text() == "somebody else's"


@pytest.mark.parametrize("slim", [True, False])
def test_slim_models(door, tmp_path, slim):
    teacher = ["MODEL.BLPSEG.LOSSES.MeanTeacher", 1.0]
    options = ["OUTPUT_DIR", tmp_path, "OUTPUT.SLIM_MODELS", slim, "SOLVER.MAX_ITER", 4, *teacher]
    assert door(*options).wait() == 0
    numbered, final, best = (
        torch.load(tmp_path / f"model_{name}.pth", weights_only=True) for name in ("0000003", "final", "best")
    )
    assert "optimizer" in numbered and ("optimizer" in final) == ("optimizer" in best) == (not slim)
    assert all(torch.equal(numbered["model"][name], value) for name, value in final["model"].items())
    left_out = numbered["model"].keys() - final["model"].keys()
    assert bool(left_out) == slim and all(name.startswith("losses.loss_mean_teacher.") for name in left_out)
    if slim:
        assert (tmp_path / "model_final.pth").stat().st_size < 0.5 * (tmp_path / "model_0000003.pth").stat().st_size
    weights = ["MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    run = door("--eval-only", *weights, *teacher, "OUTPUT_DIR", tmp_path / "evaluated")
    assert run.wait() == 0, run.output


@pytest.mark.parametrize("name", ["auto", "cuda", "cpu", "cuda:0"])
def test_device(name):
    assert choose_device(name) == ("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def test_device_is_said(door, tmp_path):
    run = door("MODEL.DEVICE", "auto", "OUTPUT_DIR", tmp_path, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1)
    assert run.wait() == 0, run.output
    assert "thread(s) each (" in run.output
    assert "cuda (" in run.output if torch.cuda.is_available() else "no GPU here, the CPU is used" in run.output


class _Clock:
    """A trainer's hook and writer with seconds of our making."""

    def __init__(self, monkeypatch, period: int, max_iter: int):
        self.now, self.lines = 0.0, []
        monkeypatch.setattr("blpseg.engine.writers.time.monotonic", lambda: self.now)
        monkeypatch.setattr("blpseg.engine.writers.logger.info", self.lines.append)
        self.writer = ProgressWriter(max_iter, images=4, window=period)
        self.hook = Writers(lambda: [self.writer], period)
        self.max_iter = max_iter

    def run(self, seconds: list[float]) -> list[str]:
        from types import SimpleNamespace

        from detectron2.utils.events import EventStorage

        with EventStorage(0) as storage:
            self.hook.trainer = SimpleNamespace(iter=0, start_iter=0, max_iter=self.max_iter)
            self.hook.before_train()
            for k, duration in enumerate(seconds):
                self.now += duration
                storage.iter = self.hook.trainer.iter = k
                storage.put_scalars(total_loss=1.0, loss_seg=1.0, time=duration, data_time=0.0)
                storage.put_scalar("lr", 0.1, smoothing_hint=False)
                self.hook.after_step()
        return self.lines


def test_lines_by_time_as_well_as_by_iteration(monkeypatch):
    """A line every 20 iterations, and none later than half a minute after the last; the first, slow iteration is
    in no forecast."""
    lines = _Clock(monkeypatch, period=20, max_iter=100).run([60.0] + [12.0] * 11)
    assert [line.split()[1] for line in lines] == ["1/100", "4/100", "7/100", "10/100"]
    assert lines[0].endswith("eta ?") and lines[1].endswith("eta 0:19:12") and "0.333 images/s" in lines[1]
    lines = _Clock(monkeypatch, period=2, max_iter=100).run([1.0] * 5)
    assert [line.split()[1] for line in lines] == ["1/100", "2/100", "4/100"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loader_workers_end_with_their_parent(door, tmp_path):
    from .test_lost_nothing import descendants

    run = door("OUTPUT_DIR", tmp_path, "DATALOADER.NUM_WORKERS", 2, "SOLVER.MAX_ITER", 100000)
    run.wait_for("iter 2/")
    workers = descendants(run.pid)
    os.kill(run.pid, 9)
    run.wait()
    assert workers
    run.wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))


@pytest.mark.parametrize("keep", [0, -1])
def test_a_checkpoint_always_stays(tmp_path, keep):
    with pytest.raises(BLPSegError, match="KEEP_CHECKPOINTS"):
        get_cfg("", ["OUTPUT.KEEP_CHECKPOINTS", keep])
    with pytest.raises(BLPSegError, match="at least 1 must stay"):
        Checkpointer(str(tmp_path), keep)  # of a config that was merged without the checks


def test_no_locks_are_said(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    cfg = get_cfg("", ["OUTPUT_DIR", str(tmp_path)])
    with caplog.at_level("WARNING", logger="blpseg.engine.output_dir"):
        claim_output_dir(cfg)
    release_output_dir(cfg.OUTPUT_DIR)
    assert "no locks on this file system" in caplog.text and str(tmp_path) in caplog.text


def test_a_trained_model_is_not_replaced_and_the_end_is_said(door, tmp_path):
    options = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path]
    run = door(*options)
    assert run.wait() == 0 and f"tools/demo.py --weights {tmp_path}/model_final.pth" in run.output
    again = door("--resume", *options)
    assert again.wait() == 0 and "SOLVER.MAX_ITER 1 is reached" in again.output
    for name in ("model_0000000.pth", "config.yaml", "metrics.json"):  # as one fetched from a cluster lies there
        (tmp_path / name).unlink()
    before = (tmp_path / "model_final.pth").read_bytes()
    for flags in ((), ("--resume",)):
        refused = door(*flags, *options)
        assert refused.wait() == 1 and "holds the model_final.pth of another run" in refused.output
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_classes_in_another_order(door, config_file, tmp_path):
    options = ["OUTPUT_DIR", tmp_path / "out", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1]
    assert door(*options).wait() == 0
    other = tmp_path / "other.yaml"
    other.write_text(config_file.read_text().replace("[background, disc, square]", "[background, square, disc]"))
    weights = ["MODEL.WEIGHTS", tmp_path / "out/model_final.pth", "OUTPUT_DIR", tmp_path / "evaluated"]
    run = door("--eval-only", *weights, config=other)
    assert run.wait() == 0 and "its class 1 is 'disc', the config's 'square'" in run.output
