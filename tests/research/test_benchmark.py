"""The benchmark's harness: that pairs do the same work and figures are what they claim. No time is asserted."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from blpseg.evaluation import Inference
from blpseg.modeling import blp_loss
from research.benchmark import workloads
from research.benchmark.literal import literal_blp_loss, plain_inference
from research.benchmark.measure import BASELINE, OURS, Row, compare_memory, compare_time, peak_memory, table
from research.benchmark.workloads import BENCHMARKS, FEATURES, WORKLOADS, Options, make_features

MIB = 2**20


@pytest.fixture(scope="module")
def options(root):
    defaults = Options()
    configs = {key: str(root / getattr(defaults, key)) for key in ("train_config", "tiny_config")}
    return Options(**configs).smoke()


def _one_block_at_a_time():
    for _ in range(3):
        torch.ones(32 * MIB // 4)


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


def in_fresh_process(function, *arguments):
    """As the benchmark measures: what this process has freed, in whatever allocator, would count for nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as child:
        return child.submit(function, *arguments).result()


def test_peak_memory_is_that_of_what_is_allocated():
    assert 31 * MIB <= in_fresh_process(peak_memory, _one_block_at_a_time, "cpu") <= 40 * MIB


def test_peak_memory_leaves_out_earlier_peaks():
    assert 7 * MIB <= in_fresh_process(_after_an_earlier_peak) <= 16 * MIB


def test_memory_freed_before_is_not_taken_for_free():
    assert 30 * MIB <= in_fresh_process(_after_many_small_blocks) <= 50 * MIB


def test_memory_of_dense_tables_is_seen_in_the_child():
    arguments = {"impl": "tiled", "kind": "noise", "grid": (48, 48), "channels": 8, "classes": 2, "batch": 1}
    megabytes = compare_memory("lam", {**arguments, "device": "cpu", "amp": False})
    one_table = 4 * 48**4 / MIB
    assert megabytes[BASELINE] >= 3 * one_table
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
        (1.0, 2.0, 2.0, "pass"), (1.0, 1.9, 2.0, "fall short"),
        (0.5, None, 1.0, "pass"), (2.0, None, 1.0, "fall short"),
        (1.0, 2.0, None, ""), (None, None, 2.0, ""), (0.0, None, 0.0, "pass"), (0.0, 1.0, 2.0, "pass"),
    ],
)  # fmt: skip
def test_verdicts(ours, baseline, target, verdict):
    row = Row("part", "case", "time", ours, baseline, target)
    assert row.verdict == verdict == row.as_dict()["verdict"]
    assert not verdict or verdict in table([row])


@pytest.mark.parametrize("kind", FEATURES)
def test_features_are_reproducible(kind):
    features = make_features(kind, 8, 12, 10)
    assert features.shape == (1, 8, 12, 10) and torch.isfinite(features).all()
    assert torch.equal(features, make_features(kind, 8, 12, 10))


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
def test_both_sides_of_a_training_step_lower_the_same_losses(options, tmp_path, pseudo):
    # Adam's first update is the sign of the gradient, where rounding near 0 counts in full; SGD's is the gradient.
    config = tmp_path / "sgd.yaml"
    config.write_text(f"_BASE_: {options.train_config}\nSOLVER: {{OPTIMIZER: SGD, BASE_LR: 0.01}}\n")
    arguments = {"config": str(config), "crop": 64, "batch": 2, "device": "cpu", "amp": False, "pseudo": pseudo}
    steps = {side: WORKLOADS["train"](side, **arguments) for side in (OURS, BASELINE)}
    first = None
    for rel in (1e-5, 1e-4):  # the second shows the first update
        losses = {side: step() for side, step in steps.items()}
        assert losses[OURS] == pytest.approx(losses[BASELINE], rel=rel)
        assert losses[OURS] != first
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


@pytest.mark.parametrize("part", ["data", "scribbles", "evaluator", "optimizer"])
def test_parts_without_models_of_their_own(part, options):
    rows = list(BENCHMARKS[part](options))
    assert rows[0].ours > 0 and rows[0].baseline > 0
    if part == "scribbles":
        assert rows[1].quantity == "labels that differ" and rows[1].ours == 0
    if part == "optimizer":
        assert rows[1].quantity == "error weights" and rows[1].verdict == "pass"


def test_exponents_of_scaling(options, monkeypatch):
    """Stand-ins whose time and memory grow as stated."""
    monkeypatch.setattr(workloads, "_lam", lambda side, **arguments: arguments)

    def cost(arguments, linear):
        return 1e-6 * (arguments["grid"][0] ** 2) ** (1 if arguments["impl"] in linear else 2)

    monkeypatch.setattr(workloads, "compare_time", lambda sides, *_, **__: ({OURS: cost(sides[OURS], ["window"])}, {}))
    monkeypatch.setattr(workloads, "compare_memory", lambda _, arguments, sides: {OURS: cost(arguments, ["auto"])})
    size = {"batch": 1, "channels": 8, "classes": 2, "device": "cpu", "amp": False}
    rows = [row for row in workloads._scaling(size, options) if row.quantity.startswith("exponent")]
    found = {(row.case, row.quantity): (round(row.ours, 6), row.verdict) for row in rows}
    assert found == {
        ("auto, 256 to 1296 positions", "exponent of time"): (2, ""),
        ("auto, 256 to 1296 positions", "exponent of memory"): (1, "pass"),
        ("window, 256 to 1296 positions", "exponent of time"): (1, "pass"),
        ("window, 256 to 1296 positions", "exponent of memory"): (2, "fall short"),
        ("dense, 256 to 1296 positions", "exponent of time"): (2, ""),
        ("dense, 256 to 1296 positions", "exponent of memory"): (2, ""),
    }


def test_what_does_not_fit_is_left_out(options, monkeypatch):
    monkeypatch.setattr(workloads, "_free_memory", lambda device: 0)
    rows = [next_ for next_, _ in zip(BENCHMARKS["lam"](options), range(5), strict=False)]
    assert all(row.ours is None and "left out: the dense tables" in row.note for row in rows)
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


def test_command_prints_a_table_and_writes_json(root, tmp_path):
    path = tmp_path / "new" / "figures.json"
    command = [sys.executable, "tools/benchmark.py", "lam", "inference", "--smoke", "--output", path]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {"environment", "options", "rows"} == set(result) and result["environment"]["threads"] >= 1
    rows = {(row["benchmark"], row["case"], row["quantity"]): row for row in result["rows"]}
    assert {row["benchmark"] for row in result["rows"]} == {"lam", "lam scaling", "inference"}
    exact = [row for key, row in rows.items() if key[1].startswith("auto") and key[2].startswith("error")]
    assert len(exact) == 3 * len(FEATURES) and all(row["verdict"] == "pass" for row in exact)
    (same,) = (row for key, row in rows.items() if key[0] == "inference" and key[2] == "error output")
    assert same["verdict"] == "pass"
    for row in result["rows"]:
        assert row["case"] in done.stdout


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["lam", "--amp"], "--device cuda"),
        (["data", "--smoke", "--train-config", "no.yaml"], "no.yaml: no such"),
        (["data", "--smoke", "--output", "/proc/none/figures.json"], "/proc/none"),
    ],
)
def test_mistakes_are_one_line(root, arguments, message):
    done = subprocess.run(
        [sys.executable, "tools/benchmark.py", *arguments],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
