"""Soft pseudo labels that agree with the predictions and with their neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable

from ..outputs import Outputs, Targets
from ..registry import keywords
from .loss import LOSS_REGISTRY, Loss
from .potts import colors_of, grid_of, ratio, seeds_of


@LOSS_REGISTRY.register()
class SoftSelfLabelling(Loss):
    """Collision cross entropy with soft pseudo labels y, which a Potts term keeps alike where the image is::

        loss = 1/|U| sum_{i in U} -ln(y_i . p_i)
        y = argmin sum_{i in U} -ln(y_i . p_i) + lambda sum_{ij} w_ij -ln(y_i . y_j / (|y_i| |y_j|))
        w_ij = exp(-|I_i - I_j|^2 / (2 sigma_rgb^2)) for the four neighbours of a grid cell

    U are the cells of the image in which nothing is annotated; in the others y is the share of each class among their
    annotated pixels. No gradient goes through y, which is found anew at each step: gradient descent from the
    predictions, over the logits of y. The mean is over images.

    Source: Zhang & Boykov, "Soft Self-labeling and Potts Relaxations for Weakly-Supervised Segmentation", CVPR 2025,
    its collision cross entropy and collision divergence; number and size of the steps are ours.
    """

    pixel_std: torch.Tensor

    @configurable
    def __init__(
        self, *, potts_weight: float, sigma_rgb: float, steps: int, step_size: float, pixel_std: Sequence[float]
    ):
        """
        Args:
            potts_weight: lambda.
            sigma_rgb: colour distance with channels in 0..1.
            steps, step_size: of the descent to y.
            pixel_std: what 0..255 channels were divided by when the images were normalised.
        """
        super().__init__()
        self.potts_weight, self.sigma_rgb, self.steps, self.step_size = potts_weight, sigma_rgb, steps, step_size
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {**keywords(cfg.MODEL.BLPSEG.SOFT_SELF_LABELLING), "pixel_std": cfg.MODEL.PIXEL_STD}

    def forward(self, outputs: Outputs, targets: Targets, images: torch.Tensor) -> torch.Tensor:
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        scale = self.pixel_std.to(logits) / (255 * self.sigma_rgb)
        colors, inside = colors_of(images.to(logits) * scale, targets.scribble, grid_of(logits))
        seeds = seeds_of(targets.scribble, logits.shape[1], grid_of(logits)).to(logits)
        annotated = seeds.sum(dim=1, keepdim=True)
        free = inside[:, 0] * (annotated[:, 0] == 0)
        log_p = logits.log_softmax(dim=1)
        log_y = self.pseudo_labels(log_p.detach(), ratio(seeds, annotated), free, colors, inside)
        collision = -(log_y + log_p).logsumexp(dim=1)
        return ratio((free * collision).sum(dim=(1, 2)), free.sum(dim=(1, 2))).mean()

    def pseudo_labels(self, log_p, seeds, free, colors, inside) -> torch.Tensor:
        """(N, C, h, w) ln y, from ln p and the seeds (N, C, h, w), the free cells (N, h, w), colours in units of
        sigma_rgb (N, 3, h, w) and the image's cells (N, 1, h, w)."""
        fixed = seeds.clamp(min=torch.finfo(seeds.dtype).eps).log()
        weights = [
            (-(colors[a] - colors[b]).square().sum(dim=1) / 2).exp() * (inside[a] * inside[b])[:, 0]
            for a, b in _NEIGHBOURS
        ]
        u = log_p
        for _ in range(self.steps):
            with torch.enable_grad():
                u = u.detach().requires_grad_(True)
                log_y = torch.where(free[:, None] > 0, u.log_softmax(dim=1), fixed)
                energy = -(free * (log_y + log_p).logsumexp(dim=1)).sum()
                length = (2 * log_y).logsumexp(dim=1, keepdim=True) / 2
                alike = log_y - length  # ln of y / |y|
                for (a, b), weight in zip(_NEIGHBOURS, weights, strict=True):
                    energy = energy - self.potts_weight * (weight * (alike[a] + alike[b]).logsumexp(dim=1)).sum()
            (gradient,) = torch.autograd.grad(energy, u)
            u = u.detach() - self.step_size * gradient
        return torch.where(free[:, None] > 0, u.log_softmax(dim=1), fixed).detach()


_ALL = slice(None)
# Each pair of neighbours once: right, below.
_NEIGHBOURS = [
    ((..., _ALL, slice(None, -1)), (..., _ALL, slice(1, None))),
    ((..., slice(None, -1), _ALL), (..., slice(1, None), _ALL)),
]
