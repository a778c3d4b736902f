"""Detectron2's own transformers by YAML: builders of its Swin and ViT classes, which lack them."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SwinTransformer, ViT

from ..utils.errors import BLPSegError
from .registry import keywords
from .timm_backbone import FeaturePyramid, PaddedToStride, freeze_stages, quarters


class _Swin(PaddedToStride, SwinTransformer):
    """Detectron2's, whose levels are p0..p3 there and whose ``size_divisibility`` reads an attribute it never sets."""

    # A classifier's file has no norms of the inner levels.
    new_weights = ("norm0.", "norm1.", "norm2.", "norm3.")

    def __init__(self, **arguments):
        super().__init__(**arguments)
        names = {f"p{i}": f"res{i + 2}" for i in self.out_indices}
        for attribute in ("_out_feature_channels", "_out_feature_strides"):
            setattr(self, attribute, {names[k]: v for k, v in getattr(self, attribute).items()})
        self._out_features = list(names.values())

    def forward(self, x):
        """(N, 3, H, W) normalised -> level name -> (N, C, H / stride, W / stride)."""
        return dict(zip(self._out_features, super().forward(x).values(), strict=True))


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """Detectron2's :class:`SwinTransformer` by ``MODEL.SWIN``, levels res2..res5.

    ``MODEL.BACKBONE.FREEZE_AT`` 1 freezes the patch embedding, k > 1 also res2 to res``k``.

    Raises:
        BLPSegError: the channels of a level cannot be shared out among its heads.
    """
    for level, heads in enumerate(cfg.MODEL.SWIN.NUM_HEADS):
        _check_heads("SWIN", cfg.MODEL.SWIN.EMBED_DIM << level, heads)
    network = _Swin(in_chans=input_shape.channels, **keywords(cfg.MODEL.SWIN))
    stages = {i + 2: f"layers.{i}" for i in range(network.num_layers)}
    freeze_stages(network, stages, cfg.MODEL.BACKBONE.FREEZE_AT)
    return network


@BACKBONE_REGISTRY.register()
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FeaturePyramid:
    """Detectron2's :class:`ViT` by ``MODEL.VIT`` with a pyramid of ``MODEL.FPN.OUT_CHANNELS``, levels res2..res5.

    ``MODEL.BACKBONE.FREEZE_AT`` 1 freezes patch embedding and positions, k > 1 also k - 1 quarters of the blocks.

    Raises:
        BLPSegError: the channels cannot be shared out among the heads.
    """
    _check_heads("VIT", cfg.MODEL.VIT.EMBED_DIM, cfg.MODEL.VIT.NUM_HEADS)
    vit = keywords(cfg.MODEL.VIT)
    square_pad = vit.pop("square_pad")
    network = ViT(in_chans=input_shape.channels, **vit)
    stages = quarters([f"blocks.{i}" for i in range(vit["depth"])])
    freeze_stages(network, stages, cfg.MODEL.BACKBONE.FREEZE_AT, "blocks.0")
    return FeaturePyramid(network, out_channels=cfg.MODEL.FPN.OUT_CHANNELS, square_pad=square_pad)


def _check_heads(section: str, channels: int, heads: int) -> None:
    if channels % heads:
        raise BLPSegError(
            f"config: MODEL.{section}.NUM_HEADS: {heads} heads cannot share {channels} channels; choose a divisor, or "
            f"another MODEL.{section}.EMBED_DIM"
        )
