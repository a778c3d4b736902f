"""The losses of METHOD section 4. All take logits on the decoder's grid and labels at image size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import nn

from .pixel_sampling import Pixels, PixelSampler, cross_entropy_at
from .registry import look_up

__all__ = [
    "SEGMENTATION_LOSS_REGISTRY",
    "BLPLoss",
    "annotation_loss",
    "blp_loss",
    "blp_weight",
    "build_segmentation_loss",
    "upsample",
]

PADDING = 255  # label of pixels outside the image

SEGMENTATION_LOSS_REGISTRY = Registry("SEGMENTATION_LOSS")
SEGMENTATION_LOSS_REGISTRY.__doc__ = """
Losses on the segmentation logits: built as ``loss(cfg)``, called as :meth:`BLPLoss.forward` is.
"""


def build_segmentation_loss(cfg: CfgNode) -> nn.Module:
    """Build ``MODEL.BLPSEG.LOSS``; an unknown one is told with those there are."""
    return look_up(SEGMENTATION_LOSS_REGISTRY, cfg.MODEL.BLPSEG.LOSS, "MODEL.BLPSEG.LOSS")(cfg)


def upsample(logits: torch.Tensor, size) -> torch.Tensor:
    """Logits (N, C, h, w) at ``size`` = (H, W) in float32: bilinear, align_corners=False."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


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


def annotation_loss(logits: torch.Tensor, scribble: torch.Tensor, unannotated_weight: float) -> torch.Tensor:
    """Weighted cross entropy of the annotation head (METHOD section 4).

    Args:
        logits: (N, C + 1, h, w) annotation logits.
        scribble: (N, H, W) long; 0..C-1 annotated, C not annotated, 255 padding.
        unannotated_weight: class weight of "not annotated"; every class has 1.

    Returns:
        a scalar; 0 when every pixel is padding.
    """
    with torch.autocast(logits.device.type, enabled=False):
        class_weight = logits.new_ones(logits.shape[1], dtype=torch.float64)
        class_weight[-1] = unannotated_weight
        loss, total = cross_entropy_at(logits, scribble, lambda _, label, pixels: class_weight[label])
        return (loss.sum() / total.sum().clamp(min=torch.finfo(torch.float32).tiny)).float()


@SEGMENTATION_LOSS_REGISTRY.register()
class BLPLoss(nn.Module):
    """:func:`blp_loss` with the exponent from ``MODEL.BLPSEG.BLP``; disabled, it is partial cross entropy."""

    @configurable
    def __init__(self, *, gamma: float):
        super().__init__()
        self.gamma = gamma

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"gamma": cfg.MODEL.BLPSEG.BLP.GAMMA if cfg.MODEL.BLPSEG.BLP.ENABLED else 0.0}

    def forward(
        self, logits: torch.Tensor, annotation_logits: torch.Tensor, target: torch.Tensor, images: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            logits, annotation_logits, target: see :func:`blp_loss`.
            images: (N, 3, H, W) normalised images, for losses that compare colours.

        Returns:
            the loss, a scalar, and scalars worth logging.
        """
        loss, mean_weight, supervised = blp_loss(logits, annotation_logits, target, self.gamma)
        return loss, {"blp_weight": mean_weight, "supervised_share": supervised / target.numel()}
