"""Potts energy of neighbouring grid cells that look alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable

from ..registry import keywords
from .loss import LOSS_REGISTRY, LabelFreeLoss
from .potts import GREATEST_EXPONENT, colors_of, grid_of, potts


@LOSS_REGISTRY.register()
class GatedCRF(LabelFreeLoss):
    """Expected Potts energy of neighbours that look alike::

        1/n sum_i sum_{j in window(i), j != i} K_ij (1 - p_i . p_j)
        K_ij = exp(-|x_i - x_j|^2 / (2 sigma_xy^2) - |I_i - I_j|^2 / (2 sigma_rgb^2))

    over the n grid cells with a pixel of the image; pairs with a cell outside it carry nothing (the gate). As in the
    paper distances are in cells of the prediction's grid, to which the image is averaged.

    Source: Obukhov, Georgoulis, Dai & Van Gool, "Gated CRF Loss for Weakly Supervised Semantic Image Segmentation",
    arXiv 1906.04651, with its position-and-colour kernel. The numbers of the defaults (radius 5, sigma_xy 6, sigma_rgb
    0.1, weight 0.1) are those of the scribble benchmarks that took the loss up (WSL4MIS), whose grid is the image's;
    here a cell is 4 pixels wide, and a grey image counts in three channels.
    """

    pixel_std: torch.Tensor

    @configurable
    def __init__(self, *, radius: int, sigma_xy: float, sigma_rgb: float, pixel_std: Sequence[float]):
        """
        Args:
            radius: of the square window, (2 radius + 1)^2 grid cells.
            sigma_xy: grid cells.
            sigma_rgb: colour distance with channels in 0..1.
            pixel_std: what 0..255 channels were divided by when the images were normalised.
        """
        super().__init__()
        self.radius, self.sigma_xy, self.sigma_rgb = radius, sigma_xy, sigma_rgb
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {**keywords(cfg.MODEL.BLPSEG.GATED_CRF), "pixel_std": cfg.MODEL.PIXEL_STD}

    def per_image(self, logits: torch.Tensor, images: torch.Tensor, scribble: torch.Tensor) -> torch.Tensor:
        scale = self.pixel_std.to(images) / (255 * self.sigma_rgb)
        colors, inside = colors_of(images * scale, scribble, grid_of(logits))
        p = logits.softmax(dim=1)
        other = inside * self._filter((1 - p.detach()) * inside, colors)
        return potts(p, other) / inside.sum(dim=(1, 2, 3)).clamp(min=1)

    @torch.no_grad()
    def _filter(self, x: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
        """sum_j K_ij x_j of (N, C, h, w), each offset's kernel used in both directions."""
        out = torch.zeros_like(x)
        height, width = x.shape[-2:]
        reach = range(-self.radius, self.radius + 1)
        for down, right in ((d, r) for d in range(self.radius + 1) for r in reach if (d, r) > (0, 0)):
            if down >= height or abs(right) >= width:
                continue
            rows, columns = slice(0, height - down), slice(max(0, -right), width - max(0, right))
            there = (..., slice(down, height), slice(columns.start + right, columns.stop + right))
            here = (..., rows, columns)
            exponent = (colors[here] - colors[there]).square_().sum(dim=1, keepdim=True)
            exponent.add_((down**2 + right**2) / self.sigma_xy**2).div_(2)
            kernel = exponent.clamp_(max=GREATEST_EXPONENT).neg_().exp_()
            out[here].addcmul_(kernel, x[there])
            out[there].addcmul_(kernel, x[here])
        return out
