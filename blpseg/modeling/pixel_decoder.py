"""Pixel decoder: pyramid pooling on the coarsest level and a top-down path to the finest (UPerNet style)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str, activation=F.relu) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=False,
        norm=get_norm(norm, out_channels),
        activation=activation,
    )
    c2_msra_fill(conv)  # kaiming-normal, fan_out
    return conv


class PyramidPooling(nn.Module):
    """Pyramid pooling module (PSPNet, Zhao et al. 2017), as in METHOD section 2.

    Args:
        in_channels: channels of the input.
        out_channels: channels of each pooled branch and of the output.
        pool_scales: sides of the adaptive average pools.
        norm: as :func:`detectron2.layers.get_norm` takes it.
        dropout: rate of the final Dropout2d.
    """

    def __init__(self, in_channels: int, out_channels: int, pool_scales: Sequence[int], norm: str, dropout: float):
        super().__init__()
        self.pool_scales = tuple(pool_scales)
        self.branches = nn.ModuleList(
            _conv(in_channels, out_channels, 1, norm, activation=None) for _ in self.pool_scales
        )
        self.bottleneck = _conv(in_channels + len(self.pool_scales) * out_channels, out_channels, 1, norm)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, h, w) -> (N, out_channels, h, w)."""
        pooled = [
            F.interpolate(
                branch(F.adaptive_avg_pool2d(x, scale)), size=x.shape[-2:], mode="bilinear", align_corners=True
            )
            for scale, branch in zip(self.pool_scales, self.branches, strict=True)
        ]
        return self.dropout(self.bottleneck(torch.cat([*pooled, x], dim=1)))


class UPerDecoder(nn.Module):
    """Top-down decoder with pyramid pooling on the coarsest level (METHOD section 2: res2..res4, and res5).

    Attributes:
        in_features (list[str]): names of the levels, finest first.
        out_channels (int): channels of the output.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        channels: int,
        common_stride: int,
        pool_scales: Sequence[int],
        norm: str,
        dropout: float,
    ):
        """
        Args:
            input_shape: of the levels, of any names and strides.
            channels: channels of every level and of the output.
            common_stride: of the output, in pixels.
            pool_scales, dropout: see :class:`PyramidPooling`.
            norm: as :func:`detectron2.layers.get_norm` takes it.
        """
        super().__init__()
        # By name as well as stride: dilated stages share a stride.
        self.in_features = sorted(input_shape, key=lambda name: (input_shape[name].stride, name))
        in_channels = [input_shape[name].channels for name in self.in_features]
        self.out_channels = channels
        self.upsampling = input_shape[self.in_features[0]].stride / common_stride
        self.pyramid_pooling = PyramidPooling(in_channels[-1], channels, pool_scales, norm, dropout)
        self.lateral_convs = nn.ModuleList(_conv(c, channels, 1, norm) for c in in_channels[:-1])
        self.output_convs = nn.ModuleList(_conv(channels, channels, 3, norm) for _ in in_channels[:-1])
        self.fuse = _conv(len(in_channels) * channels, channels, 3, norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        head, decoder = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.BLPSEG.DECODER
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "channels": head.CONVS_DIM,
            "common_stride": head.COMMON_STRIDE,
            "pool_scales": decoder.POOL_SCALES,
            "norm": head.NORM,
            "dropout": decoder.DROPOUT,
        }

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``features[name]`` (N, C_name, H_name, W_name) -> (N, channels, h, w) at the common stride."""
        levels = [features[name] for name in self.in_features]
        coarsest = self.pyramid_pooling(levels[-1])
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, levels[:-1], strict=True)]
        above = coarsest
        for i in reversed(range(len(merged))):
            merged[i] = merged[i] + _resize(above, merged[i].shape[-2:])
            above = merged[i]
        outputs = [conv(x) for conv, x in zip(self.output_convs, merged, strict=True)] + [coarsest]
        size = outputs[0].shape[-2:]
        if self.upsampling != 1:
            size = tuple(max(1, round(side * self.upsampling)) for side in size)
        return self.fuse(torch.cat([_resize(x, size) for x in outputs], dim=1))


def _resize(x: torch.Tensor, size) -> torch.Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
