"""The base class of losses, and the registry of the names in ``MODEL.BLPSEG.LOSSES``."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.registry import Registry
from torch import nn

from ...utils.errors import BLPSegError
from ..outputs import Outputs, Targets
from ..registry import look_up

LOG_PERIOD = 20  # iterations between scalars; each costs a wait for the GPU, and writers look this often

LOSS_REGISTRY = Registry("LOSS")
LOSS_REGISTRY.__doc__ = """Subclasses of :class:`Loss`, built as ``loss(cfg)``."""


class Loss(nn.Module, ABC):
    """A term of the training loss.

    Attributes:
        name: its key in the dict of training losses. A subclass that does not set it has the name of its class:
            ``GatedCRF`` is ``loss_gated_crf``.
        loss_weight: what the model multiplies it with, from ``MODEL.BLPSEG.LOSSES``.
    """

    name: str
    loss_weight: float = 1.0

    def __init__(self, cfg: CfgNode | None = None):
        super().__init__()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = "loss_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @abstractmethod
    def forward(self, outputs: Outputs, targets: Targets, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            outputs: of the network in training mode; ``annotation_logits`` is there. Under mixed precision maps may be
                of half precision; autocast is off.
            targets: the labels.
            images: (N, 3, H, W) normalised images, 0 in the padding.

        Returns:
            a scalar, the mean over what :meth:`mean_over` counts.
        """

    def attach(self, backbone: nn.Module, sem_seg_head: nn.Module) -> None:  # noqa: B027
        """Called once, with the network that is trained; for a loss that needs more of it than its outputs."""

    def mean_over(self, batched_inputs: list[dict]) -> float:
        """The number over which the scalar of these inputs is a mean: images, unless a subclass says otherwise.

        Parts of a batch, in turn (``SOLVER.ACCUMULATION_STEPS``) or in several processes, add up to the loss of the
        whole with these numbers as their weights.
        """
        return float(len(batched_inputs))

    def pixel_weights(self, outputs: Outputs, targets: Targets) -> torch.Tensor:
        """(N, H, W) weights of the annotated pixels, for pictures; 1 unless a subclass says otherwise, 0 elsewhere."""
        return (targets.scribble < outputs.logits.shape[1]).float()


class LabelFreeLoss(Loss):
    """A loss of each image by itself, independent of the annotation: the mean over the images, at least in float32.

    An image in which no pixel takes part counts as 0.
    """

    def forward(self, outputs: Outputs, targets: Targets, images: torch.Tensor) -> torch.Tensor:
        logits = outputs.logits
        with torch.autocast(logits.device.type, enabled=False):
            dtype = torch.promote_types(logits.dtype, torch.float32)
            return self.per_image(logits.to(dtype), images.to(dtype), targets.scribble).mean()

    @abstractmethod
    def per_image(self, logits: torch.Tensor, images: torch.Tensor, scribble: torch.Tensor) -> torch.Tensor:
        """The loss of each image, (N,), of logits (N, C, h, w), images (N, 3, H, W) and the scribble (N, H, W)."""


def build_losses(cfg: CfgNode) -> Mapping[str, Loss]:
    """The losses of ``MODEL.BLPSEG.LOSSES`` whose weight is not 0: name in the training losses -> :class:`Loss`.

    Raises:
        BLPSegError: a name is not registered, a weight is no number >= 0, or two losses go by one name.
    """
    losses = nn.ModuleDict()
    for registered, weight in cfg.MODEL.BLPSEG.LOSSES.items():
        key = f"MODEL.BLPSEG.LOSSES.{registered}"
        built = look_up(LOSS_REGISTRY, registered, "MODEL.BLPSEG.LOSSES")
        if not isinstance(weight, (int, float)) or not weight >= 0:
            raise BLPSegError(f"config: {key} is a weight, a number >= 0; got {weight!r}")
        if weight == 0:
            continue
        loss = built(cfg)
        if loss.name in losses:
            raise BLPSegError(f"config: {key} and {type(losses[loss.name]).__name__} are both called {loss.name}")
        loss.loss_weight = float(weight)
        losses[loss.name] = loss
    if not losses:
        raise BLPSegError("config: MODEL.BLPSEG.LOSSES has no loss with a weight above 0: nothing to train with")
    return cast("Mapping[str, Loss]", losses)


def log_scalar(name: str, value: torch.Tensor) -> None:
    """Put ``blpseg/name`` into Detectron2's event storage, where there is one, every ``LOG_PERIOD`` iterations."""
    if has_event_storage() and get_event_storage().iter % LOG_PERIOD == 0:
        get_event_storage().put_scalar(f"blpseg/{name}", float(value), smoothing_hint=False)
