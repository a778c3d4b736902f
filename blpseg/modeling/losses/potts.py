"""Shared by the losses over pairs of positions: colours on the logits' grid and the Potts energy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...utils.labels import IGNORED

# exp of float32 is many times slower on a CPU where its result is no normal number; exp(-80) counts for nothing.
GREATEST_EXPONENT = 80.0


def grid_of(maps: torch.Tensor) -> tuple[int, int]:
    """(h, w) of maps (N, K, h, w)."""
    return maps.shape[-2], maps.shape[-1]


def potts(p: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
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
def colors_of(images: torch.Tensor, scribble: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean colour of the pixels of each grid cell that are not padding (N, 3, h, w), and 1 where there are any,
    else 0 (N, 1, h, w)."""
    inside = (scribble != IGNORED).to(images)[:, None]
    share = F.adaptive_avg_pool2d(inside, grid)
    return ratio(F.adaptive_avg_pool2d(images * inside, grid), share), (share > 0).to(share)


@torch.no_grad()
def seeds_of(scribble: torch.Tensor, classes: int, grid: tuple[int, int]) -> torch.Tensor:
    """(N, H, W) scribble -> (N, C, h, w) long, how many pixels of each grid cell are annotated as each class."""
    size = scribble.shape[-2:]
    image, *place = torch.nonzero(scribble < classes, as_tuple=True)
    cell = [at * cells // pixels for at, cells, pixels in zip(place, grid, size, strict=True)]
    seeds = scribble.new_zeros(len(scribble), classes, *grid)
    where = (image, scribble[(image, *place)], *cell)
    return seeds.index_put_(where, torch.ones_like(image), accumulate=True)


def ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Their quotient; 0 where both are 0."""
    return numerator / torch.where(denominator > 0, denominator, 1)
