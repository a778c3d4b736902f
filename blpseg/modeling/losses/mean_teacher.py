"""Soft labels from a slower copy of the network."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from ...utils.errors import BLPSegError
from ..outputs import Outputs, Targets
from .loss import LOSS_REGISTRY, Loss
from .potts import grid_of


@LOSS_REGISTRY.register()
class MeanTeacher(Loss):
    """Cross entropy with the soft predictions t of a teacher, where nothing is annotated, each class alike::

        1/|K| sum_x u_x w_x sum_{c in K} -t_xc ln p_xc
        w_x = sum_{c in K} t_xc / (1 + sum_y u_y t_yc)

    with K the classes of the image, u_x the share of unannotated pixels in grid cell x, and t the teacher's prediction
    on the mirrored image, mirrored back, limited to K and normalised. So the background does not drown the rest, and a
    class of which the teacher sees less than a cell fades out. The weight is one of the cell: p = t is the optimum of
    each. A weight of each class, 1 / (1 + sum_y u_y t_yc), would let rare classes grow from step to step until they
    fill the image. The mean is over images.

    The teacher's weights are an exponential moving average of the network's, with decay min(decay, n / (n + 10)) at the
    n-th step: it begins as a copy. They are buffers of the model, so they are in its checkpoints and a resumed run goes
    on with them. The loss is ramped up linearly.

    Source: Tarvainen & Valpola, "Mean teachers are better role models", NIPS 2017; the balance of the classes is ours.
    """

    teacher: nn.ModuleList
    updates: torch.Tensor
    updated_at: torch.Tensor

    @configurable
    def __init__(self, *, decay: float, ramp_iters: int):
        """
        Args:
            decay: of the average, a step; 0 up to but not 1.
            ramp_iters: iterations until the loss has its full weight.
        """
        super().__init__()
        if not 0 <= decay < 1:
            raise BLPSegError(f"config: MODEL.BLPSEG.MEAN_TEACHER.DECAY must be from 0 up to but not 1; got {decay}")
        self.decay, self.ramp_iters = decay, ramp_iters
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("updated_at", torch.full((), -1))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        section = cfg.MODEL.BLPSEG.MEAN_TEACHER
        return {"decay": section.DECAY, "ramp_iters": section.RAMP_ITERS}

    def attach(self, backbone: nn.Module, sem_seg_head: nn.Module) -> None:
        self._student: Any = (backbone, sem_seg_head)  # a tuple: they are not parts of this module
        self.teacher = nn.ModuleList(copy.deepcopy(part) for part in self._student).requires_grad_(False)

    def train(self, mode: bool = True) -> MeanTeacher:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, outputs: Outputs, targets: Targets, images: torch.Tensor) -> torch.Tensor:
        iteration = get_event_storage().iter if has_event_storage() else int(self.updates)
        # Once a step, also where a batch comes in parts and where a step is repeated from a checkpoint.
        if int(self.updated_at) != iteration:
            self._update()
            self.updated_at.fill_(iteration)
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        target = self._targets(images, outputs.features.dtype, targets.image_classes).to(logits)
        free = F.adaptive_avg_pool2d((targets.scribble == logits.shape[1]).to(logits)[:, None], grid_of(logits))
        weight = free * (target / (1 + (free * target).sum(dim=(2, 3), keepdim=True))).sum(dim=1, keepdim=True)
        entropy = -(weight * target * logits.log_softmax(dim=1)).sum(dim=(1, 2, 3))
        ramp = min(1.0, (iteration + 1) / self.ramp_iters) if self.ramp_iters else 1.0
        return ramp * (entropy / targets.image_classes.sum(dim=1)).mean()

    @torch.no_grad()
    def _targets(self, images: torch.Tensor, dtype: torch.dtype, image_classes: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) soft labels; ``dtype`` is that of the student's features, half under mixed precision."""
        backbone, head = self.teacher
        mirrored = images.flip(-1)
        with torch.autocast(images.device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            logits = head(backbone(mirrored), mirrored, annotation=False).logits
        p = logits.float().flip(-1).softmax(dim=1) * image_classes[:, :, None, None]
        return p / p.sum(dim=1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)

    @torch.no_grad()
    def _update(self) -> None:
        n = int(self.updates)
        decay = min(self.decay, n / (n + 10))
        for average, part in zip(self.teacher, self._student, strict=True):
            for mine, new in zip(average.parameters(), part.parameters(), strict=True):
                mine.lerp_(new, 1 - decay)
            for kept, newest in zip(average.buffers(), part.buffers(), strict=True):
                kept.copy_(newest)
        self.updates += 1
