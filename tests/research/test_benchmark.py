"""The benchmark: that pairs do the same work and figures are what they claim. No time is asserted."""

import csv
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, get_context

import numpy as np
import pytest
import torch

from blpseg.evaluation import Inference
from blpseg.modeling import blp_loss
from research.benchmark.literal import literal_blp_loss, plain_inference
from research.benchmark.measure import BASELINE, OURS, compare_memory, compare_time, peak_memory, row
from research.benchmark.workloads import WORKLOADS

MIB = 2**20
SMALL = [
    "--grid", "20", "18", "--channels", "8", "--classes", "3", "--grids", "16", "--image-size", "40", "56",
    "--images", "2", "--stroke-files", "4", "--repeat", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def shared_server():
    """The process that forks others starts with all that other tests need in it, before the benchmark asks for one."""
    forkserver.ensure_running()


@pytest.fixture
def config(root, tmp_path):
    """Of a network of a few thousand weights. Adam's first update is the sign of the gradient, where rounding near 0
    counts in full; SGD's is the gradient."""
    path = tmp_path / "narrow.yaml"
    path.write_text(
        f"_BASE_: {root / 'configs/Synthetic-Scribble/blpseg_tiny.yaml'}\n"
        "MODEL:\n"
        "  BACKBONE: {NAME: build_narrow_resnet_backbone}\n"
        "  RESNETS: {STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8}\n"
        "  SEM_SEG_HEAD: {CONVS_DIM: 8}\n"
        "  BLPSEG: {HEAD_CHANNELS: 8}\n"
        "SOLVER: {OPTIMIZER: SGD, BASE_LR: 0.01}\n"
    )
    return str(path)


def _one_block_at_a_time():
    def run():
        for _ in range(3):
            torch.ones(32 * MIB // 4)

    torch.ones(1)  # loads what torch loads at its first use
    return peak_memory(run, "cpu")


def _after_an_earlier_peak():
    torch.ones(64 * MIB // 4)
    return peak_memory(lambda: torch.ones(8 * MIB // 4), "cpu")


def _after_many_small_blocks():
    # These come from the heap, which keeps them resident after they are freed; the next ones fit into their place.
    blocks = [bytearray(100_000) for _ in range(400)]
    last = bytearray(1000)
    blocks.clear()
    peak = peak_memory(lambda: [bytearray(100_000) for _ in range(330)], "cpu")
    del last
    return peak


@pytest.mark.parametrize(
    "measured, low, high",
    [
        (_one_block_at_a_time, 31, 40),
        (_after_an_earlier_peak, 7, 16),
        (_after_many_small_blocks, 30, 50),
    ],
    ids=["allocated", "after a peak", "freed"],
)
def test_peak_memory(measured, low, high):
    """In a fresh process: what this one has freed, in whatever allocator, would count for nothing."""
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as child:
        assert low * MIB <= child.submit(measured).result() <= high * MIB


def test_memory_of_dense_tables_is_seen_in_the_child():
    arguments = {"impl": "tiled", "kind": "noise", "grid": (48, 48), "channels": 8, "classes": 2, "batch": 1}
    megabytes = compare_memory("lam", {**arguments, "device": "cpu", "amp": False})
    assert megabytes[BASELINE] >= 3 * 4 * 48**4 / MIB
    assert megabytes[OURS] < megabytes[BASELINE]


def test_sides_take_turns():
    calls = []
    sides = {
        OURS: lambda: calls.append(OURS) or time.sleep(0.02) or 1,
        BASELINE: lambda: calls.append(BASELINE) or time.sleep(0.05) or 2,
    }
    seconds, results = compare_time(sides, 2)
    assert calls == [OURS, BASELINE] * 3
    assert results == {OURS: 1, BASELINE: 2} and seconds[OURS] >= 0.02 and seconds[BASELINE] >= 0.05


@pytest.mark.parametrize(
    "ours,baseline,target,verdict",
    [
        (1.0, 2.0, 2.0, "pass"), (1.0, 1.9, 2.0, "fall short"), (0.5, None, 1.0, "pass"), (0.0, 1.0, 2.0, "pass"),
        (2.0, None, 1.0, "fall short"), (1.0, 2.0, None, ""), (0.0, None, 0.0, "pass"),
    ],
)  # fmt: skip
def test_verdicts(ours, baseline, target, verdict):
    assert row("part", "case", "time", ours, baseline, target)["verdict"] == verdict


def test_literal_loss_is_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 4, 6, 5, generator=generator)).requires_grad_()
    annotation = 3 * torch.randn(2, 5, 6, 5, generator=generator)
    target = torch.randint(5, (2, 24, 20), generator=generator)
    target[:, :3] = 255
    ours, literal = blp_loss(logits, annotation, target, 2.0)[0], literal_blp_loss(logits, annotation, target, 2.0)
    torch.testing.assert_close(ours, literal)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, literal)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pseudo", [False, True])
def test_both_sides_of_a_training_step_lower_the_same_losses(config, pseudo):
    arguments = {"config": config, "crop": 64, "batch": 2, "device": "cpu", "amp": False, "pseudo": pseudo}
    steps = {side: WORKLOADS["train"](side, **arguments) for side in (OURS, BASELINE)}
    first = None
    for rel in (1e-5, 1e-4):  # the second shows the first update
        losses = {side: torch.stack(step()) for side, step in steps.items()}
        torch.testing.assert_close(losses[OURS], losses[BASELINE], rtol=rel, atol=0)
        assert first is None or not torch.equal(losses[OURS], first)
        first = losses[OURS]


def test_plain_inference_is_the_inference():
    class Model(torch.nn.Module):
        def forward(self, inputs):
            return [{"sem_seg": torch.stack([x["image"].mean(0), x["image"][0].cumsum(1)])} for x in inputs]

    model = Model().eval()
    image = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (3, 20, 30)).astype(np.float32))
    scales = (0.5, 1.0, 1.25)
    found = Inference(model, scales=scales, flip=True)([{"image": image}])[0]["sem_seg"]
    torch.testing.assert_close(found, plain_inference(model, image, scales, True), rtol=1e-4, atol=1e-2)


def test_command_prints_a_table_and_writes_csv(run_tool, config, tmp_path, capsys):
    path = tmp_path / "new" / "figures.csv"
    parts = "lam", "inference", "data", "scribbles"
    assert run_tool("tools/benchmark.py", *parts, *SMALL, "--train-config", config, "--output", str(path)) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(path.open(newline="")))
    assert {r["benchmark"] for r in rows} == {*parts, "lam scaling"} and all(r["torch"] and r["threads"] for r in rows)
    assert {(r["benchmark"], r["verdict"]) for r in rows if r["quantity"] == "error"} == {
        ("lam", "pass"), ("inference", "pass"),
    }  # fmt: skip
    assert [r["ours"] for r in rows if r["quantity"] == "labels that differ"] == ["0.0"]
    assert all(float(r["ours"]) > 0 for r in rows if r["quantity"] == "time")
    assert all(r["case"] in printed for r in rows)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["lam", "--amp"], "--device cuda"),
        (["data", "--train-config", "no.yaml"], "no.yaml"),
        (["data", "--output", "/proc/none/figures.csv"], "/proc/none"),
    ],
)
def test_mistakes_are_one_line(run_tool, capsys, arguments, message):
    assert run_tool("tools/benchmark.py", *arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("error: ")
