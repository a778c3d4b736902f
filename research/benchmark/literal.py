"""The model with every formula of METHOD taken literally: dense tables, one-hot targets, everything at image size.

What the published code does, and what ours is measured against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from blpseg.modeling import BLPSeg, Targets
from blpseg.modeling.outputs import PADDING

__all__ = ["LiteralBLPSeg", "literal_blp_loss", "plain_inference"]


def literal_blp_loss(
    logits: torch.Tensor, annotation_logits: torch.Tensor, target: torch.Tensor, gamma: float
) -> torch.Tensor:
    """METHOD section 4's sums over x and c as N x C x H x W tensors; arguments as :func:`blpseg.modeling.blp_loss`."""
    classes = logits.shape[1]
    log_p = F.log_softmax(_at_size(logits, target), dim=1)
    q = torch.softmax(_at_size(annotation_logits.detach(), target), dim=1)[:, :classes]
    supervised = torch.where((target >= 0) & (target < classes), target, classes)
    one_hot = F.one_hot(supervised, classes + 1)[..., :classes].permute(0, 3, 1, 2)
    weight = one_hot * (1 - q * log_p.detach().exp()) ** gamma
    return ((-weight * log_p).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) + 1e-7)).mean()


def _at_size(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)


class LiteralBLPSeg(BLPSeg):
    """:class:`BLPSeg` with the dense local aggregation and losses at image size."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        cfg = cfg.clone()
        cfg.MODEL.BLPSEG.LAM.IMPL = "dense"
        return super().from_config(cfg)

    def compute_losses(self, outputs, targets, images):
        logits, scribble, target = outputs.logits, targets.scribble, targets.scribble
        if self.self_training:
            p = torch.softmax(_at_size(logits.detach(), scribble), dim=1) * targets.image_classes[:, :, None, None]
            confidence, label = p.max(dim=1)
            target = torch.where(confidence < self.self_training_threshold, PADDING, label)
            target = torch.where(scribble == self.num_classes, target, scribble)
        annotation = _at_size(outputs.annotation_logits, scribble)
        weight = logits.new_ones(self.num_classes + 1, dtype=torch.float32)
        weight[-1] = self.losses["loss_annotation"].unannotated_weight
        gamma = self.losses["loss_seg"].gamma
        return {
            "loss_seg": literal_blp_loss(logits, outputs.annotation_logits, target, gamma),
            "loss_annotation": F.cross_entropy(annotation, scribble, weight, ignore_index=PADDING),
        }

    def _targets(self, outputs, scribble, image_classes):
        return Targets(scribble, image_classes, scribble)


@torch.no_grad()
def plain_inference(model: torch.nn.Module, image: torch.Tensor, scales, flip: bool) -> torch.Tensor:
    """METHOD section 7 as a loop, a forward for each view: (3, H, W) in 0..255 -> (C, H, W) averaged logits."""
    height, width = image.shape[-2:]
    views = []
    for scale in scales:
        size = round(height * scale), round(width * scale)
        scaled = F.interpolate(image[None].float(), size=size, mode="bicubic", align_corners=False)[0]
        for mirrored in (False, True) if flip else (False,):
            (output,) = model([{"image": scaled.flip(-1) if mirrored else scaled}])
            logits = output["sem_seg"].flip(-1) if mirrored else output["sem_seg"]
            views.append(F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=True)[0])
    return torch.stack(views).mean(dim=0)
