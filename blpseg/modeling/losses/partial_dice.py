"""Soft Dice of the annotated pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..outputs import Outputs, Targets
from .loss import LOSS_REGISTRY, Loss


@LOSS_REGISTRY.register()
class PartialDice(Loss):
    """One minus the mean soft Dice of the classes that are annotated in the batch, over annotated pixels alone::

        1 - 1/|K| sum_{c in K} 2 sum_x p_xc 1[y_x = c] / (sum_x p_xc + sum_x 1[y_x = c])

    with x over the annotated pixels of all images and K the classes among them, so that a class of few pixels counts as
    much as one of many. It stands beside partial cross entropy; a customary weight is 1. Without annotation it is 0.
    Of a batch in parts or in several processes it is the mean of the parts' losses.

    Source: the partial loss of Gotkowski et al., "Embarrassingly Simple Scribble Supervision for 3D Medical
    Segmentation", arXiv 2403.12834 (nnU-Net's soft Dice, without labels counted as background).
    """

    def forward(self, outputs: Outputs, targets: Targets, images: torch.Tensor) -> torch.Tensor:
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        classes, (height, width) = logits.shape[1], targets.scribble.shape[-2:]
        hits, predicted, present = (logits.new_zeros(classes) for _ in range(3))
        for maps, scribble in zip(logits, targets.scribble, strict=True):
            y, x = torch.nonzero(scribble < classes, as_tuple=True)
            # Bilinear at the pixels alone; clamping to the border is what F.interpolate does.
            place = torch.stack([(2 * x.to(maps) + 1) / width - 1, (2 * y.to(maps) + 1) / height - 1], dim=-1)
            sampled = F.grid_sample(maps[None], place[None, None], padding_mode="border", align_corners=False)
            p = sampled[0, :, 0].softmax(dim=0)  # (C, pixels)
            label = F.one_hot(scribble[y, x], classes).T.to(p)
            hits, predicted, present = hits + (p * label).sum(1), predicted + p.sum(1), present + label.sum(1)
        here = present > 0
        dice = 2 * hits / torch.where(here, predicted + present, 1)
        return torch.where(here, 1 - dice, 0).sum() / here.sum().clamp(min=1)
