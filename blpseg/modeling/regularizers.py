"""Losses from the literature that let pixels without a label train: baselines of a study, off by default.

Each looks at the segmentation logits on the decoder's grid (after local aggregation, where that is on) and sees the
image and the labels averaged over the pixels of each grid cell. A new one is a class in ``REGULARIZER_REGISTRY``,
built as ``regularizer(cfg)``; ``MODEL.BLPSEG.REGULARIZERS`` names those that are used.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import nn

from ..utils.errors import BLPSegError
from .losses import PADDING
from .registry import look_up

__all__ = ["REGULARIZER_REGISTRY", "DenseCRF", "EntropyMinimization", "GatedCRF", "Regularizer", "build_regularizers"]

REGULARIZER_REGISTRY = Registry("REGULARIZER")
REGULARIZER_REGISTRY.__doc__ = """Subclasses of :class:`Regularizer`, built as ``regularizer(cfg)``."""

# exp of float32 is many times slower on a CPU where its result is no normal number; exp(-80) counts for nothing.
GREATEST_EXPONENT = 80.0


def build_regularizers(cfg: CfgNode) -> nn.ModuleDict:
    """Build ``MODEL.BLPSEG.REGULARIZERS``: the loss's name in the training losses -> :class:`Regularizer`.

    Raises:
        BLPSegError: unknown name, or a value that makes no sense.
    """
    built = nn.ModuleDict()
    for name in cfg.MODEL.BLPSEG.REGULARIZERS:
        regularizer = look_up(REGULARIZER_REGISTRY, name, "MODEL.BLPSEG.REGULARIZERS")(cfg)
        built[regularizer.loss_name] = regularizer
    return built


class Regularizer(nn.Module, ABC):
    """A loss that needs no labels, times ``weight``."""

    loss_name: str  # its key in the training losses

    def __init__(self, weight: float):
        super().__init__()
        if not weight >= 0:
            raise BLPSegError(f"config: the weight of {type(self).__name__} must be >= 0; got {weight}")
        self.weight = weight

    def forward(self, logits: torch.Tensor, images: torch.Tensor, scribble: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: (N, C, h, w) segmentation logits; computed in float32 (float64 stays), also under autocast.
            images: (N, 3, H, W) normalised images.
            scribble: (N, H, W) long; 0..C-1 annotated, C not annotated, 255 padding.

        Returns:
            ``weight`` times the mean over the images, a scalar; an image in which no pixel takes part counts as 0.
        """
        with torch.autocast(logits.device.type, enabled=False):
            dtype = torch.promote_types(logits.dtype, torch.float32)
            return self.weight * self.per_image(logits.to(dtype), images.to(dtype), scribble).mean()

    @abstractmethod
    def per_image(self, logits: torch.Tensor, images: torch.Tensor, scribble: torch.Tensor) -> torch.Tensor:
        """The loss of each image, (N,); arguments as :meth:`forward` takes them."""


@REGULARIZER_REGISTRY.register()
class EntropyMinimization(Regularizer):
    """Mean entropy -sum_c p_c log p_c, in nats, of the pixels that are neither annotated nor padding.

    Each pixel has the prediction of its grid cell, so a cell weighs as much as the share of such pixels in it.

    Source: Grandvalet & Bengio, "Semi-supervised Learning by Entropy Minimization", NIPS 2004.
    """

    loss_name = "loss_entropy"

    @configurable
    def __init__(self, *, weight: float):
        super().__init__(weight)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"weight": cfg.MODEL.BLPSEG.ENTROPY_MINIMIZATION.WEIGHT}

    def per_image(self, logits: torch.Tensor, images: torch.Tensor, scribble: torch.Tensor) -> torch.Tensor:
        free = (scribble == logits.shape[1]).to(logits)[:, None]
        share = F.adaptive_avg_pool2d(free, logits.shape[-2:])[:, 0]
        log_p = logits.log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        return _ratio((share * entropy).sum(dim=(1, 2)), share.sum(dim=(1, 2)))


@REGULARIZER_REGISTRY.register()
class GatedCRF(Regularizer):
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

    loss_name = "loss_gated_crf"

    @configurable
    def __init__(self, *, weight: float, radius: int, sigma_xy: float, sigma_rgb: float, pixel_std: Sequence[float]):
        """
        Args:
            weight: see :class:`Regularizer`.
            radius: of the square window, (2 radius + 1)^2 grid cells.
            sigma_xy: grid cells.
            sigma_rgb: colour distance with channels in 0..1.
            pixel_std: what 0..255 channels were divided by when the images were normalised.
        """
        super().__init__(weight)
        _require_positive("GATED_CRF", RADIUS=radius, SIGMA_XY=sigma_xy, SIGMA_RGB=sigma_rgb)
        self.radius, self.sigma_xy, self.sigma_rgb = radius, sigma_xy, sigma_rgb
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        section = cfg.MODEL.BLPSEG.GATED_CRF
        return {
            "weight": section.WEIGHT,
            "radius": section.RADIUS,
            "sigma_xy": section.SIGMA_XY,
            "sigma_rgb": section.SIGMA_RGB,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def per_image(self, logits: torch.Tensor, images: torch.Tensor, scribble: torch.Tensor) -> torch.Tensor:
        scale = self.pixel_std.to(images) / (255 * self.sigma_rgb)
        colors, inside = _colors(images * scale, scribble, logits.shape[-2:])
        p = logits.softmax(dim=1)
        other = inside * self._filter((1 - p.detach()) * inside, colors)
        return _potts(p, other) / inside.sum(dim=(1, 2, 3)).clamp(min=1)

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


@REGULARIZER_REGISTRY.register()
class DenseCRF(Regularizer):
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

    loss_name = "loss_dense_crf"

    @configurable
    def __init__(
        self,
        *,
        weight: float,
        sigma_xy: float,
        sigma_rgb: float,
        max_positions: int,
        pixel_std: Sequence[float],
    ):
        """
        Args:
            weight: see :class:`Regularizer`.
            sigma_xy: pixels of the image.
            sigma_rgb: colour distance with channels in 0..255.
            max_positions: bound of the W table's side.
            pixel_std: what 0..255 channels were divided by when the images were normalised.
        """
        super().__init__(weight)
        _require_positive("DENSE_CRF", SIGMA_XY=sigma_xy, SIGMA_RGB=sigma_rgb, MAX_POSITIONS=max_positions)
        self.sigma_xy, self.sigma_rgb, self.max_positions = sigma_xy, sigma_rgb, max_positions
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        section = cfg.MODEL.BLPSEG.DENSE_CRF
        return {
            "weight": section.WEIGHT,
            "sigma_xy": section.SIGMA_XY,
            "sigma_rgb": section.SIGMA_RGB,
            "max_positions": section.MAX_POSITIONS,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def per_image(self, logits: torch.Tensor, images: torch.Tensor, scribble: torch.Tensor) -> torch.Tensor:
        grid = logits.shape[-2:]
        colors, inside = _colors(images * (self.pixel_std.to(images) / self.sigma_rgb), scribble, grid)
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
            features, p = (_ratio(F.avg_pool2d(v * inside, k, ceil_mode=True), total) for v in (features, p))
            inside = (total > 0).to(total)
        other, total = torch.zeros_like(p), p.new_zeros(len(p))
        with torch.no_grad():
            for i in range(len(p)):  # the table of one image at a time
                table = self._table(features[i].flatten(1).T)
                table *= inside[i].flatten() * inside[i].flatten()[:, None]
                other[i] = ((1 - p[i]).flatten(1) @ table).view_as(other[i])
                total[i] = table.sum()
        return _ratio(_potts(p, other), total)

    @staticmethod
    def _table(features: torch.Tensor) -> torch.Tensor:
        """(P, 5) -> exp(-|f_i - f_j|^2 / 2), (P, P)."""
        # Centred, so that what a matrix product loses to far colours stays about 1e-4 of W at worst.
        features = features - features.mean(dim=0)
        half = features.square().sum(dim=1) / 2
        exponent = torch.addmm(half[:, None] + half, features, features.T, alpha=-1)
        return exponent.clamp_(0, GREATEST_EXPONENT).neg_().exp_()


def _potts(p: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """sum_ij K_ij (1 - p_i . p_j) for each image, (N,).

    Args:
        p: (N, C, h, w) probabilities.
        other: (N, C, h, w) without gradient, sum_j K_ij (1 - p_j) with a symmetric K.
    """
    # The energy is p' K (1 - p). Its gradient, K (1 - p) - K p, is 2 K (1 - p) less a number that is the same for all
    # classes at a position, which the softmax does not see; so K is applied once and no pair is kept for the gradient.
    energy = (p * other).sum(dim=(1, 2, 3))
    return 2 * energy - energy.detach()


@torch.no_grad()
def _colors(images: torch.Tensor, scribble: torch.Tensor, grid: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean colour of the pixels of each grid cell that are not padding (N, 3, h, w), and 1 where there are any,
    else 0 (N, 1, h, w)."""
    inside = (scribble != PADDING).to(images)[:, None]
    share = F.adaptive_avg_pool2d(inside, grid)
    return _ratio(F.adaptive_avg_pool2d(images * inside, grid), share), (share > 0).to(share)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Their quotient; 0 where both are 0."""
    return numerator / torch.where(denominator > 0, denominator, 1)


def _require_positive(section: str, **values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise BLPSegError(f"MODEL.BLPSEG.{section}.{key} must be > 0; got {value}")
