"""Potts energy of all pairs of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable

from ..registry import keywords
from .loss import LOSS_REGISTRY, LabelFreeLoss
from .potts import GREATEST_EXPONENT, colors_of, grid_of, potts, ratio


@LOSS_REGISTRY.register()
class DenseCRF(LabelFreeLoss):
    """Expected Potts energy of all pairs, as a share of its greatest value::

        sum_c p_c' W (1 - p_c) / sum_ij W_ij
        W_ij = exp(-|x_i - x_j|^2 / (2 sigma_xy^2) - |I_i - I_j|^2 / (2 sigma_rgb^2))

    that is: the probability that two positions, drawn as alike and near as W says, get different labels. Exact, on
    the logits' grid, or, where that has more than ``max_positions`` positions, on squares of k x k of its cells
    averaged, with the smallest k that will do. Positions in the padding take no part. The paper's energy is not divided
    by sum W: its weight of 2e-9, with crops of 513 pixels and predictions at half that, is a weight of 8.7 times the
    mean of W here.

    Source: Tang, Perazzi, Djelouah, Ben Ayed, Schroers & Boykov, "On Regularized Losses for Weakly-supervised CNN
    Segmentation", ECCV 2018.
    """

    pixel_std: torch.Tensor

    @configurable
    def __init__(
        self,
        *,
        sigma_xy: float,
        sigma_rgb: float,
        max_positions: int,
        pixel_std: Sequence[float],
    ):
        """
        Args:
            sigma_xy: pixels of the image.
            sigma_rgb: colour distance with channels in 0..255.
            max_positions: bound of the W table's side.
            pixel_std: what 0..255 channels were divided by when the images were normalised.
        """
        super().__init__()
        self.sigma_xy, self.sigma_rgb, self.max_positions = sigma_xy, sigma_rgb, max_positions
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {**keywords(cfg.MODEL.BLPSEG.DENSE_CRF), "pixel_std": cfg.MODEL.PIXEL_STD}

    def per_image(self, logits: torch.Tensor, images: torch.Tensor, scribble: torch.Tensor) -> torch.Tensor:
        grid = grid_of(logits)
        colors, inside = colors_of(images * (self.pixel_std.to(images) / self.sigma_rgb), scribble, grid)
        y, x = (
            (torch.arange(cells, device=logits.device, dtype=logits.dtype) + 0.5) * (pixels / cells / self.sigma_xy)
            for cells, pixels in zip(grid, images.shape[-2:], strict=True)
        )
        place = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(len(logits), -1, -1, -1)
        features, p = torch.cat([colors, place], dim=1), logits.softmax(dim=1)
        k = 1
        while math.ceil(grid[0] / k) * math.ceil(grid[1] / k) > self.max_positions:
            k += 1
        if k > 1:
            total = F.avg_pool2d(inside, k, ceil_mode=True)
            features, p = (ratio(F.avg_pool2d(v * inside, k, ceil_mode=True), total) for v in (features, p))
            inside = (total > 0).to(total)
        other, total = torch.zeros_like(p), p.new_zeros(len(p))
        with torch.no_grad():
            for i in range(len(p)):  # the table of one image at a time
                table = self._table(features[i].flatten(1).T)
                table *= inside[i].flatten() * inside[i].flatten()[:, None]
                other[i] = ((1 - p[i]).flatten(1) @ table).view_as(other[i])
                total[i] = table.sum()
        return ratio(potts(p, other), total)

    @staticmethod
    def _table(features: torch.Tensor) -> torch.Tensor:
        """(P, 5) -> exp(-|f_i - f_j|^2 / 2), (P, P)."""
        # Centred, so that what a matrix product loses to far colours stays about 1e-4 of W at worst.
        features = features - features.mean(dim=0)
        half = features.square().sum(dim=1) / 2
        exponent = torch.addmm(half[:, None] + half, features, features.T, alpha=-1)
        return exponent.clamp_(0, GREATEST_EXPONENT).neg_().exp_()
