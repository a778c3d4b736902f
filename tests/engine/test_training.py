"""Optimiser, schedule and precision against torch alone; what a run shows of itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from blpseg.config import get_cfg
from blpseg.engine.amp import autocast_dtype
from blpseg.engine.optimizer import build_optimizer, gradient_norm
from blpseg.engine.resume import seed_step
from blpseg.engine.watch import pseudo_label_quality
from blpseg.utils.errors import BLPSegError

from .test_lost_nothing import weights


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def decays(optimizer, model) -> dict[str, float]:
    by_parameter = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_parameter[id(p)] for name, p in model.named_parameters()}


def test_decay_of_norms_and_biases():
    model = net()
    cfg = get_cfg("", ["SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.WEIGHT_DECAY_NORM", None])
    assert set(decays(build_optimizer(cfg, model), model).values()) == {0.01}
    cfg = get_cfg("", ["SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0])
    found = decays(build_optimizer(cfg, model), model)
    assert {name for name, decay in found.items() if decay} == {"0.weight", "3.weight"}
    with pytest.raises(BLPSegError, match="SOLVER.OPTIMIZER 'Adam'"):
        build_optimizer(get_cfg("", ["SOLVER.OPTIMIZER", "Adam"]), model)


def test_learning_rate_of_the_annotation_head():
    model = nn.ModuleDict({"annotation_head": net(), "other": net()})
    optimizer = build_optimizer(get_cfg("", ["MODEL.BLPSEG.ANNOTATION.LR_FACTOR", 10.0, "SOLVER.BASE_LR", 0.01]), model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in model["annotation_head"].parameters()} == {0.01 * 10}
    assert {rates[id(p)] for p in model["other"].parameters()} == {0.01}
    with pytest.raises(BLPSegError, match="LR_FACTOR '0.0' is not allowed"):
        build_optimizer(get_cfg("", ["MODEL.BLPSEG.ANNOTATION.LR_FACTOR", 0.0]), model)


@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_clipping(kind):
    """A step of plain SGD with rate 1 moves each weight by its clipped gradient."""
    sgd = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0]
    clip = ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5]
    for enabled in (False, True):
        model = net()
        parameters = list(model.parameters())
        optimizer = build_optimizer(get_cfg("", [*sgd, *clip, "SOLVER.CLIP_GRADIENTS.ENABLED", enabled]), model)
        model(torch.randn(2, 3, 8, 8)).pow(2).sum().mul(100).backward()
        gradients, before = [p.grad.clone() for p in parameters], [p.detach().clone() for p in parameters]
        total = torch.sqrt(sum(g.pow(2).sum() for g in gradients))
        torch.testing.assert_close(gradient_norm(parameters), total)
        optimizer.step()
        for p, old, g in zip(parameters, before, gradients, strict=True):
            norm = {"norm": g.norm(), "full_model": total}.get(kind)
            clipped = g.clamp(-0.5, 0.5) if norm is None else g * min(1.0, 0.5 / float(norm))
            torch.testing.assert_close(old - p, clipped if enabled else g, rtol=1e-3, atol=1e-5)
    with pytest.raises(BLPSegError, match="CLIP_TYPE 'all'"):
        options = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"]
        build_optimizer(get_cfg("", options), net())


def test_mixed_precision_type():
    cpu = torch.device("cpu")
    assert autocast_dtype(get_cfg(), cpu) is None
    assert autocast_dtype(get_cfg("", ["SOLVER.AMP.ENABLED", True]), cpu) is None  # fp16 is not for CPUs
    assert autocast_dtype(get_cfg("", ["SOLVER.AMP.ENABLED", True]), torch.device("cuda")) is torch.float16
    bf16 = get_cfg("", ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"])
    assert autocast_dtype(bf16, torch.device("cuda")) is torch.bfloat16
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert autocast_dtype(bf16, cpu) is (torch.bfloat16 if supported else None)
    with pytest.raises(BLPSegError, match="float8"):
        autocast_dtype(get_cfg("", ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float8"]), cpu)


def test_seed_of_a_step():
    def draw(*key):
        seed_step(*key)
        return torch.rand(4).tolist()

    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == 4
    assert draw(0, 1, 0) == draw(0, 1, 0)


def test_pseudo_label_quality_by_hand():
    scribble = np.array([[0, 3, 3], [3, 3, 3]])  # C = 3: five pixels are free
    pseudo = np.array([[0, 1, 2], [255, 1, 0]])  # four of them have a pseudo label
    truth = np.array([[0, 1, 1], [0, 255, 0]])  # one of those has no truth; of the three, two are right
    assert pseudo_label_quality(pseudo, scribble, truth, 3, 255).tolist() == [5, 4, 3, 2]
    assert pseudo_label_quality(pseudo, scribble, None, 3, 255).tolist() == [5, 4, 0, 0]


def test_schedule_in_metrics(door, tmp_path):
    """Poly, power 0.9, no warm-up (METHOD section 6), and every number that tuning needs."""
    folder = tmp_path / "out"
    options = ["OUTPUT.PANEL_PERIOD", 4, "OUTPUT.PANEL_IMAGES", 2, "TEST.EVAL_PERIOD", 4]
    options += ["MODEL.BLPSEG.SELF_TRAINING.THRESHOLD", 0.3]  # of three classes one is always above it
    run = door("OUTPUT_DIR", folder, *options)
    assert run.wait() == 0, run.output
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    merged: dict[int, dict] = {}
    for line in lines:
        merged.setdefault(line["iteration"], {}).update(line)
    assert sorted(merged) == list(range(8))
    for k in range(8):
        assert merged[k]["lr"] == pytest.approx(0.003 * (1 - k / 8) ** 0.9)
        assert {"loss_seg", "loss_annotation", "total_loss", "grad_norm", "time", "data_time"} <= merged[k].keys()
    assert {"blpseg/supervised_share", "blpseg/blp_weight", "blpseg/annotated_share"} <= merged[0].keys()
    for k in (3, 7):
        assert 0 <= merged[k]["watch/pseudo_coverage"] <= 100 and 0 <= merged[k]["watch/pseudo_precision"] <= 100
        assert 0 < merged[k]["watch/blp_weight"] <= 1
        assert "eval/sem_seg/mIoU" in merged[k]
    for word in ("iter 8/8", "images/s", "data ", "mem ", "eta 0:00:00", "lr ", "mIoU: "):
        assert word in run.output

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("panels/")]) == 2
    assert {"total_loss", "lr", "eval/sem_seg/mIoU", "watch/pseudo_coverage"} <= set(events.Tags()["scalars"])


def test_watching_changes_nothing(door, tmp_path):
    """Pictures and evaluations between the steps leave the weights as they would be."""
    for name, options in (
        ("plain", ["OUTPUT.PANEL_PERIOD", 0, "DATASETS.TEST", "()"]),
        ("watched", ["OUTPUT.PANEL_PERIOD", 2, "TEST.EVAL_PERIOD", 3, "DATALOADER.NUM_WORKERS", 2]),
    ):
        assert door("OUTPUT_DIR", tmp_path / name, *options).wait() == 0
    plain, watched = weights(tmp_path / "plain"), weights(tmp_path / "watched")
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize(
    "options",
    [
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"],
        ["SOLVER.CHANNELS_LAST", True],
        ["SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.ENABLED", True],
        ["SEED", -1, "MODEL.DEVICE", "cuda"],
    ],
)
def test_options_train(door, tmp_path, options):
    run = door("OUTPUT_DIR", tmp_path / "out", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3, *options)
    assert run.wait() == 0, run.output
    if "cuda" in options and not torch.cuda.is_available():
        assert "there is no GPU here, the CPU is used" in run.output
        run = door("--resume", "OUTPUT_DIR", tmp_path / "out", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 4, *options)
        assert run.wait() == 0 and "differs from the checkpoint's: SOLVER.MAX_ITER: 3 -> 4\n" in run.output


def test_weights_and_biases(door, tmp_path):
    """Without the package one line says so; with it (a stand-in) every iteration's scalars arrive."""
    options = ["OUTPUT_DIR", tmp_path / "out", "OUTPUT.WANDB_PROJECT", "toy", "DATASETS.TEST", "()"]
    run = door(*options, prelude="import sys; sys.modules['wandb'] = None")
    assert run.wait() == 1 and "pip install wandb" in run.errors()[0]
    stand_in = """
import json, sys, types
class Run:
    def log(self, values): print("wandb", json.dumps(values))
    def finish(self): print("wandb finished")
sys.modules["wandb"] = types.SimpleNamespace(init=lambda project, config, dir: Run())
"""
    run = door(*options, prelude=stand_in)
    assert run.wait() == 0, run.output
    sent = [json.loads(line[6:]) for line in run.output.splitlines() if line.startswith("wandb {")]
    assert [s["iteration"] for s in sent] == list(range(8)) and all("total_loss" in s for s in sent)
    assert "wandb finished" in run.output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_mixed_precision_resumes(door, tmp_path, dtype):
    options = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype, "OUTPUT_DIR", tmp_path]
    assert door(*options, "SOLVER.MAX_ITER", 4).wait() == 0
    run = door("--resume", *options, "SOLVER.MAX_ITER", 8)
    assert run.wait() == 0 and "mIoU: " in run.output
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert bool(state["scaler"]) == (dtype == "float16")
