"""Counts of the analysis against counts by hand."""

import json
import os
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from research.benchmark.analysis import _Aggregation, analyze, count_operations


@pytest.fixture(scope="module")
def module_counts():
    n, d, c = 6 * 5, 8, 3
    logits, features = torch.randn(1, c, 6, 5), torch.randn(1, d, 6, 5)
    return n, d, c, count_operations(_Aggregation(2.0), (logits, features))


def test_products_and_softmax_of_local_aggregation_are_counted(module_counts):
    n, d, c, counts = module_counts
    by_operator = counts.by_operator()
    products = sum(count for name, count in by_operator.items() if name in ("matmul", "bmm", "linear", "einsum"))
    assert products == n * n * (d + c)
    assert by_operator["softmax"] == 4 * n * n
    assert counts.total() > products + 4 * n * n


def test_parts_of_a_model(tiny_cfg):
    model = build_model(tiny_cfg)
    parts = {part.name: part for part in analyze(model, 64, 96)}
    assert list(parts) == [
        "backbone", "pixel_decoder", "predictor", "embedding", "local_aggregation", "annotation_head", "losses",
    ]  # fmt: skip
    assert sum(part.parameters for part in parts.values()) == sum(p.numel() for p in model.parameters())
    positions = 16 * 24
    widths = [m for m in model.sem_seg_head.predictor if isinstance(m, nn.Conv2d)]
    assert parts["predictor"].operations == positions * sum(m.weight.numel() for m in widths)
    assert parts["predictor"].output == 4 * positions * tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    embedding = tiny_cfg.MODEL.BLPSEG.LAM.EMBEDDING_CHANNELS
    assert parts["local_aggregation"].operations >= positions**2 * embedding
    # 384 positions are few: the dense tables, of which the softmax at least is kept.
    assert parts["local_aggregation"].kept >= 4 * positions**2
    assert all(part.kept >= 0 and part.seconds > 0 for part in parts.values())


def test_without_local_aggregation(tiny_cfg):
    tiny_cfg.MODEL.BLPSEG.LAM.ENABLED = False
    names = [part.name for part in analyze(build_model(tiny_cfg), 64, 64)]
    assert "local_aggregation" not in names and "embedding" not in names


def test_command(root):
    command = [sys.executable, "tools/analyze_model.py", "--config-file", "configs/Synthetic-Scribble/blpseg_tiny.yaml"]
    done = subprocess.run(
        [*command, "--size", "64", "64", "--json"],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"name", "parameters", "operations", "kept", "peak", "seconds", "output"} == set(json.loads(done.stdout)[0])
