"""Self-training targets (METHOD section 5)."""

from __future__ import annotations

import torch

from ..utils.labels import IGNORED
from .outputs import upsample


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
    label = torch.where(scribble < logits.shape[1], scribble, IGNORED)
    size = scribble.shape[-2:]
    with torch.autocast(logits.device.type, enabled=False):
        # An image at a time: at image size a batch of probabilities is larger than what the network keeps of it.
        for target, annotation, x, classes in zip(label, scribble, logits, image_classes, strict=True):
            probability = upsample(x[None], size)[0].softmax(dim=0).mul_(classes[:, None, None])
            confidence, predicted = probability.max(dim=0)
            predicted[confidence < threshold] = IGNORED
            torch.where(annotation == logits.shape[1], predicted, target, out=target)
    return label
