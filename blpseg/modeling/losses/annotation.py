"""The annotation head's loss (METHOD section 4)."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable

from ..outputs import Outputs, Targets
from ..pixel_sampling import cross_entropy_at
from .loss import LOSS_REGISTRY, Loss


def annotation_loss(logits: torch.Tensor, scribble: torch.Tensor, unannotated_weight: float) -> torch.Tensor:
    """Weighted cross entropy of the annotation head (METHOD section 4).

    Args:
        logits: (N, C + 1, h, w) annotation logits.
        scribble: (N, H, W) long; 0..C-1 annotated, C not annotated, 255 padding.
        unannotated_weight: class weight of "not annotated"; every class has 1.

    Returns:
        a scalar; 0 when every pixel is padding.
    """
    with torch.autocast(logits.device.type, enabled=False):
        class_weight = logits.new_ones(logits.shape[1], dtype=torch.float64)
        class_weight[-1] = unannotated_weight
        loss, total = cross_entropy_at(logits, scribble, lambda _, label, pixels: class_weight[label])
        return (loss.sum() / total.sum().clamp(min=torch.finfo(torch.float32).tiny)).float()


@LOSS_REGISTRY.register()
class AnnotationLoss(Loss):
    """:func:`annotation_loss` with the weight of "not annotated" from ``MODEL.BLPSEG.ANNOTATION``."""

    name = "loss_annotation"

    @configurable
    def __init__(self, *, num_classes: int, unannotated_weight: float):
        super().__init__()
        self.num_classes = num_classes
        self.unannotated_weight = unannotated_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "unannotated_weight": cfg.MODEL.BLPSEG.ANNOTATION.UNANNOTATED_WEIGHT,
        }

    def forward(self, outputs: Outputs, targets: Targets, images: torch.Tensor) -> torch.Tensor:
        return annotation_loss(outputs.annotation_logits, targets.scribble, self.unannotated_weight)

    def mean_over(self, batched_inputs: list[dict]) -> float:
        """Weighted pixels."""
        annotated = sum(int((x["scribble"] < self.num_classes).sum()) for x in batched_inputs)
        free = sum(int((x["scribble"] == self.num_classes).sum()) for x in batched_inputs)
        return annotated + self.unannotated_weight * free
