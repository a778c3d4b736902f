"""The network's outputs and its training targets, which are the arguments of every loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Outputs(NamedTuple):
    """Maps on the head's grid of h x w cells (stride 4 in the published models), of N images padded to one size.

    Attributes:
        logits: (N, C, h, w) segmentation logits, after local aggregation where that is on.
        annotation_logits: (N, C + 1, h, w), the last channel "not annotated"; (N, 0, h, w) if they were not asked for.
        features: (N, D, h, w) the pixel decoder's output, from which both are predicted.
        raw_logits: (N, C, h, w) segmentation logits before local aggregation.
        embedding: (N, E, h', w') features that local aggregation compares; None without it.
    """

    logits: torch.Tensor
    annotation_logits: torch.Tensor
    features: torch.Tensor
    raw_logits: torch.Tensor
    embedding: torch.Tensor | None


class Targets(NamedTuple):
    """Labels at the size (H, W) of the padded images.

    Attributes:
        scribble: (N, H, W) long; 0..C-1 annotated, C not annotated, 255 padding.
        image_classes: (N, C) bool, the classes present in each image, background always.
        supervision: (N, H, W) long; 0..C-1 a label, anything else none. It is the scribble, and once self-training has
            begun the scribble and the pseudo labels.
    """

    scribble: torch.Tensor
    image_classes: torch.Tensor
    supervision: torch.Tensor


def upsample(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Logits (N, C, h, w) at ``size`` = (H, W) in float32: bilinear, align_corners=False."""
    return F.interpolate(logits.float(), size=list(size), mode="bilinear", align_corners=False)
