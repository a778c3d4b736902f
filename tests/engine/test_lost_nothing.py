"""Killed, interrupted, cut off: a resumed run ends where an undisturbed one does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

# Dies at the n-th call of a function, as by `kill -9`.
KILL_AT = """
import os, signal, {module} as module
original, calls = module.{name}, []
def fatal(*args, **kwargs):
    calls.append(1)
    if len(calls) == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
module.{name} = fatal
"""


def weights(folder: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model"]


def assert_same(a: Path, b: Path, tolerance: float = 1e-6) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [(line["iteration"], line["total_loss"]) for line in lines if "total_loss" in line]


def test_sigkill_anywhere(door, tmp_path):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    options = ["TEST.EVAL_PERIOD", "5", "DATALOADER.NUM_WORKERS", "1"]
    run = door("OUTPUT_DIR", calm, *options)
    assert run.wait() == 0, run.output

    checkpoint = "blpseg.checkpoint.writing"
    places = [
        ("blpseg.engine.step", "gradient_norm", 2),  # before there is any checkpoint
        (checkpoint, "_Sink.write", 5),  # half a checkpoint is written
        (checkpoint, "os.fsync", 1),  # written, not yet on the disk
        (checkpoint, "os.replace", 1),  # on the disk, not yet in place
        (checkpoint, "os.replace", 2),  # in place, last_checkpoint is not
        ("blpseg.engine.trainer", "evaluate", 1),  # at the first evaluation
        ("blpseg.engine.optimizer", "torch.optim.AdamW.step", 1),
        (checkpoint, "Checkpointer.name_final", 1),
    ]
    for k, (module, name, n) in enumerate(places):
        run = door("--resume", "OUTPUT_DIR", rough, *options, prelude=KILL_AT.format(module=module, name=name, n=n))
        assert run.wait() == -signal.SIGKILL, f"{name}: {run.output}"
        if k == 0:
            assert not list(rough.glob("model_*.pth"))
    run = door("--resume", "OUTPUT_DIR", rough, *options)
    assert run.wait() == 0, run.output
    assert_same(calm, rough)
    assert losses(calm) == losses(rough)
    evaluations = [json.loads((folder / "evaluations.json").read_text()) for folder in (calm, rough)]
    assert evaluations[0] == evaluations[1] and [e["iteration"] for e in evaluations[0]] == [4, 7]
    assert not list(rough.glob(".*.tmp"))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits(door, tmp_path, processes, signum):
    folder = tmp_path / "out"
    options = ["--num-gpus", processes, "OUTPUT_DIR", folder, "SOLVER.CHECKPOINT_PERIOD", "100000"]
    run = door(*options, "SOLVER.MAX_ITER", "100000")
    run.wait_for("iter 3/")
    run.send(signum)  # to the parent alone, as schedulers do
    assert run.wait() == 128 + signum, run.output
    assert "Traceback" not in run.output and not run.errors()
    assert "interrupted after iteration" in run.output
    (saved,) = folder.glob("model_*.pth")
    iteration = torch.load(saved, weights_only=True)["iteration"]
    assert saved.name == f"model_{iteration:07d}.pth" and iteration >= 2
    run = door("--resume", *options, "SOLVER.MAX_ITER", iteration + 3, "DATASETS.TEST", "()")
    assert run.wait() == 0, run.output
    assert losses(folder)[-1][0] == iteration + 2


def test_two_processes_killed_by_their_parent(door, tmp_path):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    options = ["--num-gpus", 2, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 12]
    assert door(*options, "OUTPUT_DIR", calm).wait() == 0
    run = door(*options, "OUTPUT_DIR", rough)
    run.wait_for("iter 5/")
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    run = door("--resume", *options, "OUTPUT_DIR", rough)
    assert run.wait() == 0, run.output  # the orphans are gone, or it would find the folder locked
    assert_same(calm, rough)


def test_truncated_and_damaged_checkpoints_are_skipped(door, tmp_path):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    options = ["DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 2, "OUTPUT.KEEP_CHECKPOINTS", 3]
    assert door(*options, "OUTPUT_DIR", calm).wait() == 0
    assert door(*options, "OUTPUT_DIR", rough).wait() == 0
    assert sorted(p.name for p in rough.glob("model_0*.pth")) == [f"model_000000{i}.pth" for i in (3, 5, 7)]
    newest, second = rough / "model_0000007.pth", rough / "model_0000005.pth"
    newest.write_bytes(newest.read_bytes()[:-1000])
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 0x40  # one bit, in the middle of some weight
    second.write_bytes(bytes(content))
    run = door("--resume", *options, "OUTPUT_DIR", rough)
    assert run.wait() == 0, run.output
    for path in (newest, second):
        (line,) = [line for line in run.output.splitlines() if "skipped" in line and path.name in line]
    assert "continuing after iteration 3" in run.output
    assert_same(calm, rough)

    for path in rough.glob("model_0*.pth"):
        path.write_bytes(b"")
    run = door("--resume", *options, "OUTPUT_DIR", rough)
    assert run.wait() == 1
    (error,) = run.errors()
    assert "none of its checkpoints can be read" in error and "--overwrite" in error


def descendants(pid: int) -> list[int]:
    children = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_signal_to_all_processes(door, tmp_path, processes, everyone):
    """A terminal's Ctrl-C reaches the process group, a scheduler's SIGTERM every process, loader workers too."""
    folder = tmp_path / "out"
    options = ["--num-gpus", processes, "OUTPUT_DIR", folder, "DATALOADER.NUM_WORKERS", 2, "SOLVER.MAX_ITER", 100000]
    run = door(*options, "SOLVER.CHECKPOINT_PERIOD", 100000)
    run.wait_for("iter 3/")
    if everyone:
        for pid in [run.pid, *descendants(run.pid)]:
            with contextlib.suppress(ProcessLookupError):  # ended by its parent, which had the signal before it
                os.kill(pid, signal.SIGTERM)
    else:
        os.killpg(run.pid, signal.SIGINT)
    assert run.wait() == 128 + (signal.SIGTERM if everyone else signal.SIGINT), run.output
    assert "Traceback" not in run.output and not run.errors()
    assert len(list(folder.glob("model_*.pth"))) == 1
