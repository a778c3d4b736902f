"""Optimisers and gradient clipping by config."""

from __future__ import annotations

import re

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from ..utils.errors import BLPSegError

# Positions, tokens, layer scales, and biases and temperatures of attention, as Detectron2 and timm call them.
NEVER_DECAYED = re.compile(
    r"\w*pos_embed\w*|rel_pos_[hw]|relative_position_bias_table|(cls|dist|reg)_token|gamma\w*|layer_scale\w*|[qv]_bias|"
    "attention_biases|logit_scale|temperature"
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """``SOLVER.OPTIMIZER`` over ``model``'s parameters (docs/METHOD.md: AdamW), with ``SOLVER.CLIP_GRADIENTS``.

    ``SOLVER.WEIGHT_DECAY_NORM`` and ``WEIGHT_DECAY_BIAS`` (Detectron2's keys) set another decay for norms and biases;
    None, the default here, treats them as every other weight. ``NEVER_DECAYED`` weights of transformers never decay.
    The backbone's learning rate is ``SOLVER.BACKBONE_MULTIPLIER`` times the others', but for layers that it adds to its
    pretrained network; the annotation head's ``MODEL.BLPSEG.ANNOTATION.LR_FACTOR`` times. Raises BLPSegError if there
    is nothing to train.
    """
    solver = cfg.SOLVER
    added = getattr(getattr(model, "backbone", None), "new_weights", ())
    factors = {
        "annotation_head.": cfg.MODEL.BLPSEG.ANNOTATION.LR_FACTOR,
        **{f"backbone.{name}": 1.0 for name in added},
        "backbone.": solver.BACKBONE_MULTIPLIER,
    }
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: next((factor for part, factor in factors.items() if part in name), 1.0),
        overrides={name: {"weight_decay": 0.0} for name in names if NEVER_DECAYED.fullmatch(name)},
    )
    if not groups:
        raise BLPSegError("config: the model has no weight to train; is everything frozen (MODEL.BACKBONE.FREEZE_AT)?")
    if solver.OPTIMIZER == "AdamW":
        # One pass over the weights instead of a dozen: a sixth of the time on a CPU, the same numbers to rounding.
        fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        optimizer = torch.optim.AdamW(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, fused=fused)
    else:  # the tables of allowed values have no third
        optimizer = torch.optim.SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    if solver.CLIP_GRADIENTS.ENABLED:
        _clip_before_steps(optimizer, solver.CLIP_GRADIENTS)
    return optimizer


def gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """L2 norm over all gradients, a scalar tensor on their device; NaN or infinite if any of them is."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _clip_before_steps(optimizer: torch.optim.Optimizer, clip: CfgNode) -> None:
    """CLIP_TYPE ``value`` and ``norm`` act on each parameter by itself, as in Detectron2; ``full_model`` bounds the
    norm over all of them (Mask2Former's name)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip_gradients(*_) -> None:
        if clip.CLIP_TYPE == "value":
            nn.utils.clip_grad_value_(parameters, clip.CLIP_VALUE)
        else:
            for group in [parameters] if clip.CLIP_TYPE == "full_model" else [[p] for p in parameters]:
                nn.utils.clip_grad_norm_(group, clip.CLIP_VALUE, clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_gradients)
