"""The balanced label preference loss (METHOD section 4)."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable

from ..outputs import Outputs, Targets, upsample
from ..pixel_sampling import Pixels, PixelSampler, cross_entropy_at
from .loss import LOSS_REGISTRY, Loss, log_scalar


def blp_weight(log_p: torch.Tensor, log_q: torch.Tensor, gamma: float) -> torch.Tensor:
    """(1 - q p)^gamma, without gradient, from the log-probabilities of the annotated class; any shape."""
    return (1 - torch.exp(log_p.detach() + log_q.detach())).clamp_(min=0) ** gamma


def blp_loss(
    logits: torch.Tensor, annotation_logits: torch.Tensor, target: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balanced label preference loss (METHOD section 4): the mean over images of their weighted cross entropy.

    Args:
        logits: (N, C, h, w) segmentation logits.
        annotation_logits: (N, C + 1, h, w); no gradient reaches them.
        target: (N, H, W) long; 0..C-1 is supervision, anything else is left out.
        gamma: exponent of the weight; 0 is plain partial cross entropy.

    Returns:
        the loss, a scalar; the mean weight over supervised pixels and their number, scalars without gradient.
    """
    with torch.autocast(logits.device.type, enabled=False):
        annotation = PixelSampler(annotation_logits, target.shape[-2:])

        def weigh(log_p: torch.Tensor, label: torch.Tensor, pixels: Pixels) -> torch.Tensor:
            if gamma == 0:
                return torch.ones_like(log_p)
            return blp_weight(log_p, annotation.log_softmax(pixels).gather(1, label), gamma)

        numerator, denominator = cross_entropy_at(logits, target, weigh)
        loss = (numerator / (denominator + 1e-7)).mean().float()
    supervised = ((target >= 0) & (target < logits.shape[1])).sum()
    return loss, denominator.sum() / supervised.clamp(min=1), supervised


@LOSS_REGISTRY.register()
class BLPLoss(Loss):
    """:func:`blp_loss` with the exponent from ``MODEL.BLPSEG.BLP``; disabled, it is partial cross entropy."""

    name = "loss_seg"

    @configurable
    def __init__(self, *, gamma: float):
        super().__init__()
        self.gamma = gamma

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"gamma": cfg.MODEL.BLPSEG.BLP.GAMMA if cfg.MODEL.BLPSEG.BLP.ENABLED else 0.0}

    def forward(self, outputs: Outputs, targets: Targets, images: torch.Tensor) -> torch.Tensor:
        loss, weight, supervised = blp_loss(outputs.logits, outputs.annotation_logits, targets.supervision, self.gamma)
        log_scalar("blp_weight", weight)
        log_scalar("supervised_share", supervised / targets.supervision.numel())
        return loss

    def pixel_weights(self, outputs: Outputs, targets: Targets) -> torch.Tensor:
        """(N, H, W): (1 - q p)^gamma of the annotated class, 0 where there is no annotation."""
        annotated = targets.scribble < outputs.logits.shape[1]
        label = (targets.scribble * annotated)[:, None]
        log_p, log_q = (
            upsample(x, label.shape[-2:]).log_softmax(dim=1).gather(1, label)
            for x in (outputs.logits, outputs.annotation_logits)
        )
        return blp_weight(log_p, log_q, self.gamma)[:, 0] * annotated
