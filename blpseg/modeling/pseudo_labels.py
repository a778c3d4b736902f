"""Self-training targets (METHOD section 5)."""

from __future__ import annotations

import torch

from .losses import PADDING, upsample

__all__ = ["pseudo_labels"]


@torch.no_grad()
def pseudo_labels(
    logits: torch.Tensor, scribble: torch.Tensor, image_classes: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Confident predictions among the classes of each image; annotated pixels keep their annotation.

    Args:
        logits: (N, C, h, w) segmentation logits.
        scribble: (N, H, W) long; 0..C-1 annotated, C not annotated, 255 padding.
        image_classes: (N, C) bool, the classes in each image's scribble before augmentation, background always.
        threshold: predictions of a lower probability are left out.

    Returns:
        (N, H, W) long: 0..C-1 supervision, 255 none.
    """
    with torch.autocast(logits.device.type, enabled=False):
        probability = upsample(logits, scribble.shape[-2:]).softmax(dim=1)
        confidence, label = (probability * image_classes[:, :, None, None]).max(dim=1)
    label[confidence < threshold] = PADDING
    annotated = scribble < logits.shape[1]
    label[annotated] = scribble[annotated]
    label[scribble == PADDING] = PADDING
    return label
