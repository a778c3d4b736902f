"""Counts of the analysis against counts by hand."""

import json
import runpy

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from blpseg.modeling.local_aggregation import local_aggregation

from ..conftest import ROOT

TOOL = runpy.run_path(str(ROOT / "tools/analyze_model.py"))


def test_products_and_softmax_of_local_aggregation_are_counted():
    class Dense(nn.Module):
        def forward(self, logits, features):
            return local_aggregation(logits, features, 2.0, impl="dense")

    n, d, c = 6 * 5, 8, 3
    inputs = torch.randn(1, c, 6, 5), torch.randn(1, d, 6, 5)
    # Beside the two products and the softmax: decay and weight are elementwise, a few operations for each pair.
    assert n * n * (d + c + 4) < TOOL["count_operations"](Dense(), inputs) < n * n * (d + c + 4 + 12)


def test_parts_of_a_model(tiny_cfg):
    parts = TOOL["analyze"](tiny_cfg, 64, 96)
    assert sorted(parts) == [
        "annotation_head", "backbone", "embedding", "local_aggregation", "pixel_decoder", "predictor",
    ]  # fmt: skip
    model = build_model(tiny_cfg)
    assert sum(part["parameters"] for part in parts.values()) == sum(p.numel() for p in model.parameters())
    positions = 16 * 24
    widths = [m for m in model.sem_seg_head.predictor.modules() if isinstance(m, nn.Conv2d)]
    predicted = parts["predictor"]
    assert predicted["operations"] == pytest.approx(positions * sum(m.weight.numel() for m in widths), rel=0.05)
    assert predicted["output"] == 4 * positions * tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    lam = parts["local_aggregation"]
    assert lam["operations"] >= positions**2 * tiny_cfg.MODEL.BLPSEG.LAM.EMBEDDING_CHANNELS
    assert all(part["kept"] >= 0 and part["seconds"] > 0 for part in parts.values())


def test_without_local_aggregation(tiny_cfg):
    tiny_cfg.MODEL.BLPSEG.LAM.ENABLED = False
    parts = TOOL["analyze"](tiny_cfg, 64, 64)
    assert "local_aggregation" not in parts and "embedding" not in parts


def test_command(run_tool, root, capsys):
    config = str(root / "configs/Synthetic-Scribble/blpseg_tiny.yaml")
    assert run_tool("tools/analyze_model.py", "--config-file", config, "--size", "64", "64", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["backbone"]) == {
        "parameters", "operations", "output", "kept", "seconds",
    }  # fmt: skip
    assert run_tool("tools/analyze_model.py", "--config-file", config, "--size", "64", "64") == 0
    assert "kept, MiB" in capsys.readouterr().out
    assert run_tool("tools/analyze_model.py", "--config-file", config, "--size", "16", "64") == 1
    assert "at least 32 pixels" in capsys.readouterr().err
