"""Maps on the decoder's grid, read and differentiated at pixels of the image, without the map at image size.

At image size a batch of logits has 16 times the numbers it has on the grid, and log-probabilities, weights and
their gradients as many again each. A loss needs them one pixel at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

__all__ = ["PixelSampler", "cross_entropy_at"]

CHUNK_PIXELS = 1 << 15  # with 60 classes 8 MB a table on a CPU
CHUNK_PIXELS_CUDA = 1 << 19


class PixelSampler:
    """Bilinear interpolation (align_corners=False) at some pixels only.

    The result at a pixel is that of ``F.interpolate(maps, size, mode="bilinear", align_corners=False)``.

    Args:
        maps: (N, C, h, w) on a grid; any floating dtype, computed in float32 (float64 stays).
        size: (H, W) of the images.
    """

    def __init__(self, maps: torch.Tensor, size: tuple[int, int]):
        self.shape, self.size = maps.shape, tuple(size)
        dtype = torch.promote_types(maps.dtype, torch.float32)
        self.table = maps.detach().to(dtype).permute(0, 2, 3, 1).reshape(-1, maps.shape[1])  # (N h w, C)
        self.rows, self.columns = (
            self._axis(out, grid, maps.device, dtype) for out, grid in zip(self.size, maps.shape[-2:], strict=True)
        )

    @staticmethod
    def _axis(out: int, grid: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The two grid lines that surround each pixel (out, 2) and their weights (out, 2)."""
        position = ((torch.arange(out, dtype=torch.float64, device=device) + 0.5) * (grid / out) - 0.5).clamp_(min=0)
        lower = position.long().clamp_(max=grid - 1)
        fraction = (position - lower).to(dtype)
        lines = torch.stack([lower, (lower + 1).clamp_(max=grid - 1)], dim=1)
        return lines, torch.stack([1 - fraction, fraction], dim=1)

    def chunks(self, pixels: torch.Tensor) -> Iterator[slice]:
        """Slices of the pixels that bound the memory of what is sampled at a time."""
        size = CHUNK_PIXELS_CUDA if pixels.is_cuda else CHUNK_PIXELS
        return (slice(start, start + size) for start in range(0, len(pixels), size))

    def corners(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For (M,) indices into the N H W pixels: the four rows of ``table`` around each (M, 4), and weights (M, 4)."""
        height, width = self.size
        image, row, column = pixels // (height * width), pixels // width % height, pixels % width
        lines, across = self.rows[0][row], self.columns[0][column]
        lines = lines + (image * self.shape[-2])[:, None]
        index = (lines[:, :, None] * self.shape[-1] + across[:, None, :]).flatten(1)
        weight = (self.rows[1][row][:, :, None] * self.columns[1][column][:, None, :]).flatten(1)
        return index, weight

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(M,) indices into the N H W pixels -> (M, C), without gradient."""
        return self.sample(*self.corners(pixels))

    def sample(self, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """:meth:`__call__` at ``corners(pixels)``."""
        return F.embedding_bag(index, self.table, per_sample_weights=weight, mode="sum")

    def to_maps(self, table: torch.Tensor) -> torch.Tensor:
        """(N h w, C) -> (N, C, h, w)."""
        n, _, height, width = self.shape
        return table.view(n, height, width, -1).permute(0, 3, 1, 2)


class _CrossEntropyAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, pixels, label, size, weigh):
        sampler = PixelSampler(logits, size)
        grad_table = torch.zeros_like(sampler.table) if ctx.needs_input_grad[0] else None
        # index_add sums one by one; in float32 that costs 1e-4 of the loss at 10^5 pixels.
        numerator = sampler.table.new_zeros(len(logits), dtype=torch.float64)
        denominator = torch.zeros_like(numerator)
        for chunk in sampler.chunks(pixels):
            image, target = pixels[chunk] // (size[0] * size[1]), label[chunk, None]
            index, corner_weight = sampler.corners(pixels[chunk])
            log_p = sampler.sample(index, corner_weight).log_softmax(dim=1)
            log_p_label = log_p.gather(1, target)
            weight = weigh(log_p_label, chunk).to(log_p)
            numerator.index_add_(0, image, (-weight * log_p_label)[:, 0].double())
            denominator.index_add_(0, image, weight[:, 0].double())
            if grad_table is not None:
                grad = log_p.exp_().scatter_add_(1, target, -torch.ones_like(weight)).mul_(weight)
                for corner in range(4):
                    grad_table.index_add_(0, index[:, corner], grad * corner_weight[:, corner, None])
        ctx.mark_non_differentiable(denominator)
        if grad_table is not None:
            ctx.save_for_backward(sampler.to_maps(grad_table))
            ctx.dtype = logits.dtype
        return numerator, denominator

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (grad_maps,) = ctx.saved_tensors
        return (grad_maps * grad.to(grad_maps)[:, None, None, None]).to(ctx.dtype), None, None, None, None


def cross_entropy_at(
    logits: torch.Tensor,
    pixels: torch.Tensor,
    label: torch.Tensor,
    size: tuple[int, int],
    weigh: Callable[[torch.Tensor, slice], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums of the cross entropy of bilinearly upsampled logits at some pixels, an image at a time.

    The gradient is made beside the value, so that nothing at image size is kept for it.

    Args:
        logits: (N, C, h, w) on a grid; differentiable.
        pixels: (M,) indices into the N H W pixels, ascending.
        label: (M,) classes at these pixels.
        size: (H, W) of the images.
        weigh: called with the log-probability of the label at some of the pixels (m, 1) and the slice of the
            pixels these are; returns their weights (m, 1), which count as constant.

    Returns:
        the sums of -weight * log p[label] and of the weights, (N,) float64; the second without gradient.
    """
    return _CrossEntropyAt.apply(logits, pixels, label, tuple(size), weigh)
