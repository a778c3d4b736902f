"""Heads on the decoder's output and the shallow embedding of the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .initialization import initialize

__all__ = ["PixelHead", "ShallowEmbedding"]


class PixelHead(nn.Sequential):
    """Per-pixel classifier of three 1x1 convolutions (METHOD section 2).

    The segmentation head has C outputs, the annotation head C + 1. (N, in_channels, h, w) -> (N, out_channels, h, w).
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, hidden_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, hidden_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, out_channels, 1),
        )
        initialize(self)


class ShallowEmbedding(nn.Module):
    """One feature vector for each 4 x 4 patch of the image: what local aggregation compares (METHOD section 2).

    Args:
        channels: D, the length of a feature vector.
        patch_size: side of a patch in pixels, the stride of the logits.
    """

    def __init__(self, channels: int, patch_size: int = 4):
        super().__init__()
        self.patch_size = patch_size
        self.patches = nn.Conv2d(3, channels, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels)
        self.projection = nn.Conv2d(channels, channels, 1)
        initialize(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised images -> (N, D, ceil(H / 4), ceil(W / 4))."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.patches(images)
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return self.projection(x)
