"""Entropy of the predictions where nothing is annotated."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .loss import LOSS_REGISTRY, LabelFreeLoss
from .potts import grid_of, ratio


@LOSS_REGISTRY.register()
class EntropyMinimization(LabelFreeLoss):
    """Mean entropy -sum_c p_c log p_c, in nats, of the pixels that are neither annotated nor padding.

    Each pixel has the prediction of its grid cell, so a cell weighs as much as the share of such pixels in it.
    A customary weight is 0.1.

    Source: Grandvalet & Bengio, "Semi-supervised Learning by Entropy Minimization", NIPS 2004.
    """

    name = "loss_entropy"

    def per_image(self, logits: torch.Tensor, images: torch.Tensor, scribble: torch.Tensor) -> torch.Tensor:
        free = (scribble == logits.shape[1]).to(logits)[:, None]
        share = F.adaptive_avg_pool2d(free, grid_of(logits))[:, 0]
        log_p = logits.log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        return ratio((share * entropy).sum(dim=(1, 2)), share.sum(dim=(1, 2)))
