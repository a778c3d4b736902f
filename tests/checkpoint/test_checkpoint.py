"""Weights files: what is read, what is refused, where the weights go."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from blpseg.checkpoint import Checkpointer, load_file, load_weights, save_atomic
from blpseg.utils.downloads import cache_path
from blpseg.utils.errors import BLPSegError


class Evil:
    """Touches a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


class Net(nn.Module):
    """A backbone whose names are those of a ResNet's stem and first stage, and a head."""

    def __init__(self, classes: int = 3, width: int = 4):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "stem": nn.ModuleDict({"conv1": nn.Conv2d(3, width, 3, bias=False)}),
                "res2": nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(width, 4, 3, bias=False)})]),
            }
        )
        self.sem_seg_head = nn.ModuleDict({"predictor": nn.Conv2d(4, classes, 1)})


BACKBONE = {
    "stem.conv1.weight": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32),
    "res2.0.conv1.weight": np.random.default_rng(1).normal(size=(4, 4, 3, 3)).astype(np.float32),
    "stem.fc.weight": np.zeros((10, 4), np.float32),
}


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_files_are_refused(tmp_path, suffix, protocol):
    trap, path = tmp_path / "trap", tmp_path / f"weights.{suffix}"
    data = {"model": {"x": Evil(trap)}}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(data, protocol))
    else:
        torch.save(data, path, pickle_protocol=protocol)
    with pytest.raises(BLPSegError, match="refused, it holds more than tensors") as info:
        load_file(str(path))
    assert str(path) in str(info.value) and "--trust-checkpoint" in str(info.value)
    assert not trap.exists()
    load_file(str(path), trust=True)
    assert trap.exists()  # the trap works; it was the loader that kept it shut


def test_malicious_weights_through_the_command_line(door, tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"x": Evil(trap)}}))
    for more in (["--eval-only"], []):
        run = door(*more, "OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", path)
        assert run.wait() == 1
        (line,) = run.errors()
        assert str(path) in line and "refused" in line and not trap.exists()


def test_malicious_checkpoint_is_not_resumed(door, tmp_path):
    folder, trap = tmp_path / "out", tmp_path / "trap"
    assert door("OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2).wait() == 0
    path = folder / "model_0000001.pth"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "more": Evil(trap)}, path)
    run = door("--resume", "OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3)
    assert run.wait() == 1 and not trap.exists()
    run = door("--resume", "--trust-checkpoint", "OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3)
    assert run.wait() == 0 and trap.exists()
    assert "any code in this file runs now" in run.output


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"\x80\x04", pickle.dumps([1, 2])])
@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_broken_files_are_one_line(tmp_path, data, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(data)
    with pytest.raises(BLPSegError) as info:
        load_file(str(path))
    assert str(path) in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("named", [True, False])
def test_detectron2_pickle_into_the_backbone(tmp_path, protocol, named):
    path = tmp_path / "R.pkl"
    content = {"model": BACKBONE, "__author__": "someone", "matching_heuristics": True} if named else BACKBONE
    path.write_bytes(pickle.dumps(content, protocol))
    net = Net()
    head = net.sem_seg_head["predictor"].weight.clone()
    load_weights(net, str(path), complete=False)
    for name in ("stem.conv1.weight", "res2.0.conv1.weight"):
        np.testing.assert_array_equal(net.backbone.state_dict()[name], BACKBONE[name])
    assert torch.equal(net.sem_seg_head["predictor"].weight, head)
    with pytest.raises(BLPSegError, match="lacks 2 of the model's weights"):
        load_weights(net, str(path), complete=True)


def test_own_checkpoint_and_its_class_count(tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save({"model": Net().state_dict()}, path)
    load_weights(Net(), path, complete=True)
    for complete in (True, False):
        with pytest.raises(BLPSegError, match="made for 3 classes.*NUM_CLASSES 5; set it to 3") as refused:
            load_weights(Net(classes=5), path, complete=complete)
        assert ("RESET_CLASS_LAYERS" in str(refused.value)) == (not complete), "it is for training"
    load_weights(Net(classes=5), path, complete=False, other_classes=True)
    with pytest.raises(BLPSegError, match="another shape.*backbone.stem.conv1.weight"):
        load_weights(Net(width=6), path, complete=False)


def test_half_a_backbone_is_refused(tmp_path):
    path = str(tmp_path / "half.pth")
    torch.save({"stem.conv1.weight": torch.zeros(4, 3, 3, 3)}, path)
    with pytest.raises(BLPSegError, match="lacks 1 .*backbone.res2.0.conv1.weight.*MODEL.RESNETS.DEPTH"):
        load_weights(Net(), path, complete=False)
    torch.save({"else": torch.zeros(1)}, path)
    with pytest.raises(BLPSegError, match="none of its 1 weights fits"):
        load_weights(Net(), path, complete=False)


def test_unreachable_url_says_where_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr("blpseg.utils.downloads.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(BLPSegError) as info:
        load_file("detectron2://DeepLab/R-103.pkl")
    place = cache_path("https://dl.fbaipublicfiles.com/detectron2/DeepLab/R-103.pkl")
    assert str(place) in str(info.value) and place.is_relative_to(tmp_path)
    place.write_bytes(pickle.dumps({"model": BACKBONE}))
    assert load_file("detectron2://DeepLab/R-103.pkl")["model"].keys() == BACKBONE.keys()


def test_a_run_keeps_at_least_one_checkpoint(tmp_path):
    for keep in (0, -1):
        with pytest.raises(BLPSegError, match="KEEP_CHECKPOINTS"):
            Checkpointer(str(tmp_path), keep)


def test_retention_and_names(tmp_path):
    saver = Checkpointer(str(tmp_path), keep=2)
    for iteration in (1, 3, 5):
        saver.save({"iteration": iteration, "optimizer": {}, "model": {}}, iteration)
        if iteration == 1:
            saver.name_best(iteration)
    saver.name_final(5)
    saver.name_final(5)  # as a resumed run does that has no iteration left
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last_checkpoint", "model_0000003.pth", "model_0000005.pth", "model_best.pth", "model_final.pth"]
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    # A run resumed from iteration 3 replaces what came after it.
    saver.save({"iteration": 4, "optimizer": {}, "model": {}}, 4)
    assert saver.iterations() == [4, 3]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    save_atomic(str(path), {"a": torch.ones(3)})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="model.pth: cannot be written: No space left"):
        save_atomic(str(path), {"a": torch.zeros(3)})
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_checkpoint_tells_what_made_it(door, tmp_path):
    folder = tmp_path / "out"
    assert door("OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 2).wait() == 0
    state = torch.load(folder / "model_final.pth", weights_only=True)
    assert state["class_names"] == ["background", "disc", "square"]
    assert state["versions"]["torch"] == torch.__version__ and state["versions"]["git_revision"]
    # The stored config is enough to evaluate the model again, and to load it Detectron2's own way.
    config = tmp_path / "stored.yaml"
    config.write_text(state["config"])
    run = door("--eval-only", "MODEL.WEIGHTS", folder / "model_final.pth", config=config)
    assert run.wait() == 0 and "mIoU: " in run.output
