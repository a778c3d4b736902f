"""The head: pixel decoder, classifier, annotation head and local aggregation (METHOD section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_sem_seg_head
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from ..utils.errors import BLPSegError
from ..utils.labels import IGNORED
from .annotation_head import PlaceHead
from .local_aggregation import LocalAggregation
from .outputs import Outputs
from .pixel_decoder import UPerDecoder
from .registry import look_up


class PixelHead(nn.Sequential):
    """Per-pixel classifier of three 1x1 convolutions (METHOD section 2).

    (N, in_channels, h, w) -> (N, out_channels, h, w).
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, hidden_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, hidden_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, out_channels, 1),
        )
        for i in (0, 2, 4):
            c2_msra_fill(self[i])  # kaiming-normal, fan_out


@SEM_SEG_HEADS_REGISTRY.register()
class BLPSegHead(nn.Module):
    """Features -> segmentation logits and annotation logits.

    Attributes:
        size_divisibility: the image's sides must be multiples of it; 0 if any will do.
    """

    @configurable
    def __init__(
        self,
        *,
        pixel_decoder: nn.Module,
        predictor: nn.Module,
        annotation_head: nn.Module,
        local_aggregation: LocalAggregation | None,
        size_divisibility: int = 0,
    ):
        """
        Args:
            pixel_decoder: dict of feature maps -> (N, D, h, w).
            predictor: decoder output -> (N, C, h, w) logits.
            annotation_head: decoder output -> (N, C + 1, h, w) logits; or a :class:`PlaceHead`.
            local_aggregation: on the predictor's logits; None leaves it out.
            size_divisibility: see above.
        """
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.annotation_head = annotation_head
        self.local_aggregation = local_aggregation
        self.size_divisibility = size_divisibility

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        decoder = UPerDecoder(cfg, input_shape)
        hidden, classes = cfg.MODEL.BLPSEG.HEAD_CHANNELS, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        return {
            "pixel_decoder": decoder,
            "predictor": PixelHead(decoder.out_channels, hidden, classes),
            **_scribble_parts(cfg, decoder.out_channels),
        }

    def forward(self, features: Mapping[str, torch.Tensor], images: torch.Tensor, annotation: bool = True) -> Outputs:
        """
        Args:
            features: of the backbone, by name.
            images: (N, 3, H, W) normalised, from which local aggregation makes its embedding.
            annotation: False leaves the annotation logits out, which inference does not need.
        """
        decoded = self.pixel_decoder(features)
        logits = raw_logits = self.predictor(decoded)
        embedding = None
        if self.local_aggregation is not None:
            embedding = self.local_aggregation.embedding(images)
            logits = self.local_aggregation(raw_logits, embedding)
        # Detached: the annotation loss must not change the features of the segmentation (METHOD section 2).
        if not annotation:
            annotation_logits = raw_logits[:, :0]
        elif isinstance(self.annotation_head, PlaceHead):
            annotation_logits = self.annotation_head(images, logits.detach())
        else:
            annotation_logits = self.annotation_head(decoded.detach())
        return Outputs(logits, annotation_logits, decoded, raw_logits, embedding)


def _scribble_parts(cfg: CfgNode, channels: int) -> dict[str, nn.Module | None]:
    """The parts that BLPSeg adds to a decoder of ``channels`` and its classifier."""
    head, blpseg = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.BLPSEG
    lam = blpseg.LAM
    if blpseg.ANNOTATION.PLACE:
        annotation_head: nn.Module = PlaceHead(blpseg.HEAD_CHANNELS, head.COMMON_STRIDE)
    else:
        annotation_head = PixelHead(channels, blpseg.HEAD_CHANNELS, head.NUM_CLASSES + 1)
    return {
        "annotation_head": annotation_head,
        "local_aggregation": LocalAggregation(
            lam.EMBEDDING_CHANNELS, head.COMMON_STRIDE, sigma=lam.SIGMA, impl=lam.IMPL, window=lam.WINDOW
        )
        if lam.ENABLED
        else None,
    }


class _Layers(nn.Module):
    """The layers of a head in Detectron2's form, without its last one."""

    head: Any  # has ``layers``

    def __init__(self, head: nn.Module):
        super().__init__()
        head.predictor = nn.Identity()
        self.head = head

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.head.layers(features)


def build_head(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> BLPSegHead:
    """Build ``MODEL.SEM_SEG_HEAD.NAME``: a :class:`BLPSegHead`, or a head in the form of Detectron2's
    ``DeepLabV3PlusHead`` and ``SemSegFPNHead`` (``layers(features)`` ends in ``predictor``), which gets the annotation
    head and local aggregation on its features.

    Args:
        cfg: ``IN_FEATURES`` may be empty for all of the backbone's.
        input_shape: of the backbone's features.

    Raises:
        BLPSegError: the head is unknown, of another form or cannot be built, or a key has a value that BLPSeg cannot
            honour.
    """
    cfg = cfg.clone()
    cfg.defrost()
    section = cfg.MODEL.SEM_SEG_HEAD
    section.IN_FEATURES = list(section.IN_FEATURES) or list(input_shape)
    _check(section, input_shape)
    # DeepLab's image pooling would otherwise be of the crop's size, which images at inference do not have.
    cfg.INPUT.CROP.ENABLED = False
    look_up(SEM_SEG_HEADS_REGISTRY, section.NAME, "MODEL.SEM_SEG_HEAD.NAME")
    try:
        head = build_sem_seg_head(cfg, input_shape)
    except (AssertionError, ValueError) as error:
        raise BLPSegError(f"config: MODEL.SEM_SEG_HEAD.NAME {section.NAME} cannot be built: {error}") from error
    if isinstance(head, BLPSegHead):
        return head
    predictor = getattr(head, "predictor", None)
    if not hasattr(head, "layers") or not isinstance(predictor, nn.Conv2d):
        raise BLPSegError(
            f"config: MODEL.SEM_SEG_HEAD.NAME {section.NAME} shows no features for the annotation head; use BLPSegHead "
            "or a head whose layers(features) ends in a convolution `predictor` (DeepLabV3PlusHead, SemSegFPNHead)"
        )
    return BLPSegHead(
        pixel_decoder=_Layers(head),
        predictor=predictor,
        **_scribble_parts(cfg, predictor.in_channels),
        size_divisibility=max(input_shape[name].stride for name in section.IN_FEATURES),
    )


def _check(section: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> None:
    """Refuse values that BLPSeg's heads cannot honour."""
    missing = [name for name in section.IN_FEATURES if name not in input_shape]
    if missing:
        raise BLPSegError(
            f"config: MODEL.SEM_SEG_HEAD.IN_FEATURES names {', '.join(missing)}, but the backbone gives "
            f"{', '.join(input_shape)} ([] takes them all)"
        )
    if section.IGNORE_VALUE != IGNORED:
        raise BLPSegError(f"config: MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {IGNORED} in BLPSeg; got {section.IGNORE_VALUE}")
    if section.LOSS_WEIGHT != 1:
        raise BLPSegError(
            f"config: MODEL.SEM_SEG_HEAD.LOSS_WEIGHT {section.LOSS_WEIGHT}: weigh each loss in MODEL.BLPSEG.LOSSES"
        )
