"""Maps on the decoder's grid, read and differentiated at pixels of the image, without a batch of maps at image size.

At image size a batch of logits has 16 times the numbers it has on the grid, and log-probabilities, weights and
their gradients as many again each. A loss needs them one pixel at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK_PIXELS = 1 << 14  # with 60 classes 4 MB a table on a CPU
CHUNK_PIXELS_CUDA = 1 << 19
# From this share of pixels on, interpolating whole images is faster than gathering the four corners of each pixel.
DENSE_SHARE = 1 / 4


class Pixels(NamedTuple):
    """Some pixels of a batch: (m,) ascending indices into the N H W; or whole rows, where image and rows are given."""

    indices: torch.Tensor
    image: int | None = None
    rows: slice | None = None


def choose_pixels(wanted: torch.Tensor) -> Iterator[Pixels]:
    """The pixels of a mask, (N, H, W) bool, in portions that bound the memory of one sampling.

    If the mask has many pixels the portions are whole rows, which include pixels outside the mask.
    """
    index = torch.nonzero(wanted.flatten())[:, 0]
    n, height, width = wanted.shape
    size = CHUNK_PIXELS_CUDA if index.is_cuda else CHUNK_PIXELS
    if len(index) < DENSE_SHARE * wanted.numel():
        yield from map(Pixels, index.split(size)) if len(index) else ()
        return
    for image in range(n):
        for start in range(0, height, max(1, size // width)):
            rows = slice(start, min(start + max(1, size // width), height))
            first = (image * height + rows.start) * width
            last = (image * height + rows.stop) * width
            yield Pixels(torch.arange(first, last, device=wanted.device), image, rows)


class PixelSampler:
    """Bilinear interpolation, that of ``F.interpolate(..., align_corners=False)``, at some pixels only.

    Args:
        maps: (N, C, h, w) on a grid; any floating dtype, computed in float32 (float64 stays); no gradient is kept.
        size: (H, W) of the images.
    """

    def __init__(self, maps: torch.Tensor, size: Sequence[int]):
        self.maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
        self.size = tuple(size)
        self.table = self.maps.permute(0, 2, 3, 1).flatten(0, 2)  # (N h w, C)
        self.rows, self.columns = map(self._axis, self.size, self.maps.shape[-2:])

    def _axis(self, out: int, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The two grid lines that surround each pixel (out, 2) and their weights (out, 2)."""
        pixel = torch.arange(out, dtype=torch.float64, device=self.maps.device)
        position = ((pixel + 0.5) * (grid / out) - 0.5).clamp_(min=0)
        lower = position.long().clamp_(max=grid - 1)
        fraction = (position - lower).to(self.maps.dtype)
        lines = torch.stack([lower, (lower + 1).clamp_(max=grid - 1)], dim=1)
        return lines, torch.stack([1 - fraction, fraction], dim=1)

    def _corners(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For (m,) indices into the N H W pixels: the four rows of ``table`` around each (m, 4), and weights (m, 4)."""
        height, width = self.size
        image, row, column = index // (height * width), index // width % height, index % width
        lines, across = self.rows[0][row], self.columns[0][column]
        lines = lines + (image * self.maps.shape[-2])[:, None]
        cells = (lines[:, :, None] * self.maps.shape[-1] + across[:, None, :]).flatten(1)
        weight = (self.rows[1][row][:, :, None] * self.columns[1][column][:, None, :]).flatten(1)
        return cells, weight

    def log_softmax(self, pixels: Pixels) -> torch.Tensor:
        """(m, C) log-probabilities, without gradient."""
        if pixels.image is None:
            cells, weight = self._corners(pixels.indices)
            return F.embedding_bag(cells, self.table, per_sample_weights=weight, mode="sum").log_softmax(dim=1)
        lines, weight = self.rows[0][pixels.rows], self.rows[1][pixels.rows, :, None]
        maps = self.maps[pixels.image]
        maps = maps[:, lines[:, 0]] * weight[:, 0] + maps[:, lines[:, 1]] * weight[:, 1]
        maps = F.interpolate(maps[None], (len(lines), self.size[1]), mode="bilinear", align_corners=False)
        return maps.log_softmax(dim=1)[0].flatten(1).T  # over planes, which is faster than over rows of C

    def add_gradient(self, grad: torch.Tensor, pixels: Pixels, out: torch.Tensor) -> None:
        """Add what a gradient (m, C) at the pixels is on the grid to ``out`` (N, C, h, w)."""
        if pixels.image is None:
            table = torch.zeros_like(self.table)
            cells, weight = self._corners(pixels.indices)
            for corner in range(4):
                table.index_add_(0, cells[:, corner], grad * weight[:, corner, None])
            out += table.view(len(out), *out.shape[2:], -1).permute(0, 3, 1, 2)
            return
        lines, weight = self.rows[0][pixels.rows], self.rows[1][pixels.rows, :, None]
        size, shape = (len(lines), self.size[1]), (1, len(grad[0]), len(lines), out.shape[-1])
        # The transpose of F.interpolate, called as its own backward calls it.
        maps = torch.ops.aten.upsample_bilinear2d_backward(grad.T.reshape(*shape[:2], *size), size, shape, False)[0]
        for side in range(2):
            out[pixels.image].index_add_(1, lines[:, side], maps * weight[:, side])


class _CrossEntropyAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, weigh):
        sampler = PixelSampler(logits, target.shape[-2:])
        grad_maps = torch.zeros_like(sampler.maps) if ctx.needs_input_grad[0] else None
        # Summed one by one in float32 they would be 1e-4 off at 10^5 pixels.
        numerator = sampler.maps.new_zeros(len(logits), dtype=torch.float64)
        denominator = torch.zeros_like(numerator)
        wanted = (target >= 0) & (target < logits.shape[1])
        for pixels in choose_pixels(wanted):
            here = wanted.flatten()[pixels.indices, None]
            label = target.flatten()[pixels.indices, None] * here
            log_p = sampler.log_softmax(pixels)
            log_p_label = log_p.gather(1, label)
            weight = weigh(log_p_label, label, pixels).to(log_p) * here
            image = pixels.indices // target[0].numel()
            numerator.index_add_(0, image, (-weight * log_p_label)[:, 0].double())
            denominator.index_add_(0, image, weight[:, 0].double())
            if grad_maps is not None:
                grad = log_p.exp_().scatter_add_(1, label, -torch.ones_like(weight)).mul_(weight)
                sampler.add_gradient(grad, pixels, grad_maps)
        ctx.mark_non_differentiable(denominator)
        if grad_maps is not None:
            ctx.save_for_backward(grad_maps)
            ctx.dtype = logits.dtype
        return numerator, denominator

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (grad_maps,) = ctx.saved_tensors
        return (grad_maps * grad.to(grad_maps)[:, None, None, None]).to(ctx.dtype), None, None


def cross_entropy_at(
    logits: torch.Tensor,
    target: torch.Tensor,
    weigh: Callable[[torch.Tensor, torch.Tensor, Pixels], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums of the cross entropy of bilinearly upsampled logits at supervised pixels, an image at a time.

    The gradient is computed together with the value, so nothing of image size is kept for it.

    Args:
        logits: (N, C, h, w) on a grid; differentiable.
        target: (N, H, W) long; 0..C-1 is supervision, anything else is left out.
        weigh: called with the log-probability of the label at some pixels (m, 1), the label (m, 1) and the pixels;
            returns their weights (m, 1), which count as constant. Those of pixels left out are ignored.

    Returns:
        the sums of -weight * log p[label] and of the weights, (N,) float64; the second without gradient.
    """
    return _CrossEntropyAt.apply(logits, target, weigh)
