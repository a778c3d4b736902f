"""Backbones by config, and a ResNet as narrow as wanted, for training from scratch on a CPU."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling import build_backbone as build_registered_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from ..utils.errors import BLPSegError, describe

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def build_backbone(cfg: CfgNode) -> Backbone:
    """Detectron2's function of that name, for its networks and those of timm and users.

    Raises:
        BLPSegError: the network cannot be built from the config, whatever its builder raises.
    """
    try:
        return build_registered_backbone(cfg)
    except BLPSegError:
        raise
    except Exception as error:  # builders check their keys by assertions, or not at all
        raise BLPSegError(
            f"config: MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} cannot be built, {type(error).__name__}: "
            f"{describe(error)[:300]}"
        ) from error


@BACKBONE_REGISTRY.register()
def build_narrow_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet-18 or -34 of any width; Detectron2's own builder has 64 channels only.

    res2..res5 have ``MODEL.RESNETS.RES2_OUT_CHANNELS`` times 1, 2, 4, 8 channels at strides 4, 8, 16, 32.

    Raises:
        BLPSegError: another ``MODEL.RESNETS.DEPTH``.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in _BLOCKS:
        raise BLPSegError(f"config: MODEL.RESNETS.DEPTH {resnets.DEPTH}: the narrow ResNet has 18 or 34 layers")
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, norm=resnets.NORM)
    stages, channels = [], resnets.STEM_OUT_CHANNELS
    for i, blocks in enumerate(_BLOCKS[resnets.DEPTH]):
        out_channels = resnets.RES2_OUT_CHANNELS * 2**i
        strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                in_channels=channels,
                out_channels=out_channels,
                norm=resnets.NORM,
                stride_per_block=strides,
            )
        )
        channels = out_channels
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES).freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
