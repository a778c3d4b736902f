"""Mixed precision by config."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def autocast_dtype(cfg: CfgNode, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision on ``device`` by ``SOLVER.AMP``; None for float32 throughout."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name = cfg.SOLVER.AMP.DTYPE
    if device.type != "cpu":
        return getattr(torch, name)
    if name == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    logger.info(f"mixed precision with {name} is not for this CPU: training in float32")
    return None
