"""Pixel decoder: pyramid pooling on res5 and a top-down path to stride 4 (UPerNet style)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry
from torch import nn

from .initialization import initialize
from .registry import look_up

__all__ = ["PIXEL_DECODER_REGISTRY", "PyramidPooling", "UPerDecoder", "build_pixel_decoder"]

PIXEL_DECODER_REGISTRY = Registry("PIXEL_DECODER")
PIXEL_DECODER_REGISTRY.__doc__ = """
Pixel decoders: built as ``decoder(cfg, input_shape)``, map backbone features to one (N, out_channels, H/4, W/4) map.
"""


def build_pixel_decoder(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """Build ``MODEL.BLPSEG.DECODER.NAME`` for a backbone with output ``input_shape``."""
    name = cfg.MODEL.BLPSEG.DECODER.NAME
    return look_up(PIXEL_DECODER_REGISTRY, name, "MODEL.BLPSEG.DECODER.NAME")(cfg, input_shape)


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str, activation=F.relu) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=False,
        norm=get_norm(norm, out_channels),
        activation=activation,
    )


class PyramidPooling(nn.Module):
    """Pyramid pooling module (PSPNet, Zhao et al. 2017) as METHOD section 2 has it.

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


@PIXEL_DECODER_REGISTRY.register()
class UPerDecoder(nn.Module):
    """Top-down decoder over res2..res4 with pyramid pooling on res5 (METHOD section 2).

    Attributes:
        out_channels (int): channels of the output.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        channels: int,
        pool_scales: Sequence[int],
        norm: str,
        dropout: float,
    ):
        """
        Args:
            input_shape: output shape of the backbone; all levels are used, finest first by stride and name.
            channels: channels of every level and of the output.
            pool_scales, dropout: see :class:`PyramidPooling`.
            norm: as :func:`detectron2.layers.get_norm` takes it.
        """
        super().__init__()
        # By name as well as stride: dilated stages share a stride.
        self.in_features = sorted(input_shape, key=lambda name: (input_shape[name].stride, name))
        in_channels = [input_shape[name].channels for name in self.in_features]
        self.out_channels = channels
        self.pyramid_pooling = PyramidPooling(in_channels[-1], channels, pool_scales, norm, dropout)
        self.lateral_convs = nn.ModuleList(_conv(c, channels, 1, norm) for c in in_channels[:-1])
        self.output_convs = nn.ModuleList(_conv(channels, channels, 3, norm) for _ in in_channels[:-1])
        self.fuse = _conv(len(in_channels) * channels, channels, 3, norm)
        initialize(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        decoder = cfg.MODEL.BLPSEG.DECODER
        return {
            "input_shape": input_shape,
            "channels": decoder.CHANNELS,
            "pool_scales": decoder.POOL_SCALES,
            "norm": cfg.MODEL.BLPSEG.NORM,
            "dropout": decoder.DROPOUT,
        }

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``features[name]`` (N, C_name, H_name, W_name) -> (N, channels, H_finest, W_finest)."""
        levels = [features[name] for name in self.in_features]
        coarsest = self.pyramid_pooling(levels[-1])
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, levels[:-1], strict=True)]
        above = coarsest
        for i in reversed(range(len(merged))):
            merged[i] = merged[i] + _resize(above, merged[i].shape[-2:])
            above = merged[i]
        outputs = [conv(x) for conv, x in zip(self.output_convs, merged, strict=True)] + [coarsest]
        return self.fuse(torch.cat([_resize(x, outputs[0].shape[-2:]) for x in outputs], dim=1))


def _resize(x: torch.Tensor, size) -> torch.Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
