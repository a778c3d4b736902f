"""The meta-architecture: backbone -> head -> losses (METHOD sections 2, 4 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from ..utils.labels import IGNORED
from ..utils.state_dict import current_name
from .backbone import build_backbone
from .local_aggregation import LocalAggregation
from .losses import Loss, build_losses
from .losses.loss import log_scalar
from .outputs import Outputs, Targets, upsample
from .pseudo_labels import pseudo_labels
from .sem_seg_head import BLPSegHead, build_head


@META_ARCH_REGISTRY.register()
class BLPSeg(nn.Module):
    """BLPSeg (Wang et al., IEEE TIP 2023): a segmentation network that also predicts where annotators scribble.

    Detectron2 counterpart: :class:`detectron2.modeling.SemanticSegmentor`.
    """

    sem_seg_head: BLPSegHead
    losses: Mapping[str, Loss]
    pixel_mean: torch.Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: BLPSegHead,
        losses: Mapping[str, Loss],
        num_classes: int,
        self_training_start: int | None,
        self_training_threshold: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            backbone: images -> dict of feature maps.
            sem_seg_head: feature maps -> :class:`Outputs`.
            losses: name in the training losses -> :class:`blpseg.modeling.losses.Loss`.
            num_classes: C, background included.
            self_training_start: first iteration with pseudo labels; None for never.
            self_training_threshold: see :func:`pseudo_labels`.
            pixel_mean, pixel_std: normalisation of a channel in 0..255, in the order of INPUT.FORMAT.
        """
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.losses = losses
        for loss in losses.values():
            loss.attach(backbone, sem_seg_head)
        self.num_classes = num_classes
        self.self_training_start = self_training_start
        self.self_training_threshold = self_training_threshold
        self.normalization = (tuple(pixel_mean), tuple(pixel_std))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        self_training = cfg.MODEL.BLPSEG.SELF_TRAINING
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_head(cfg, backbone.output_shape()),
            "losses": build_losses(cfg),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "self_training_start": self_training.START_ITER if self_training.ENABLED else None,
            "self_training_threshold": self_training.THRESHOLD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def local_aggregation(self) -> LocalAggregation | None:
        """LAM, with its embedding; None without it."""
        return self.sem_seg_head.local_aggregation

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """
        Args:
            batched_inputs: a dict an image with

                * ``image``: (3, H, W), 0..255, channels in the order of INPUT.FORMAT; sizes may differ.
                * ``scribble`` (training): (H, W) long; 0..C-1 annotated, C not annotated, 255 padding.
                * ``image_classes`` (training): (C,) bool, classes present in the image, background always.
                * ``height``, ``width`` (inference, optional): the size of the result.

        Returns:
            in training the losses of ``MODEL.BLPSEG.LOSSES`` by name, scalars times their weights; otherwise a list of
            ``{"sem_seg": (C, height, width) float32 logits}``.
        """
        images = self.preprocess_image(batched_inputs)
        if self.training:
            # Before the network, all of which a copy to the GPU would wait for.
            labels = self._labels(batched_inputs, images.tensor)
            outputs = self.outputs(images.tensor)
            return self.compute_losses(outputs, self._targets(outputs, *labels), images.tensor)
        logits = upsample(self.outputs(images.tensor, annotation=False).logits, images.tensor.shape[-2:])
        return [
            {"sem_seg": sem_seg_postprocess(x, size, given.get("height", size[0]), given.get("width", size[1]))}
            for x, size, given in zip(logits, images.image_sizes, batched_inputs, strict=True)
        ]

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the ``image`` of each input, and pad them at the right and the bottom to one size that fits."""
        images = [self.normalize(x["image"].to(self.device)) for x in batched_inputs]
        constraints = dict(self.backbone.padding_constraints)
        asked = constraints.pop("size_divisibility", 1)
        divisibility = max(1, asked, self.backbone.size_divisibility, self.sem_seg_head.size_divisibility)
        if square := constraints.get("square_size"):  # a larger image gets a larger square
            longest = max(side for image in images for side in image.shape[-2:])
            constraints["square_size"] = max(square, -(-longest // divisibility) * divisibility)
        # Padding after normalisation is the mean colour, as in the crops of training.
        return ImageList.from_tensors(images, divisibility, padding_constraints=constraints)

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) in 0..255 -> float32. In float64 and rounded once, as the published loader does it: rounding
        decides about pseudo labels near the threshold."""
        wide = torch.float32 if image.device.type == "mps" else torch.float64  # what Metal does not have
        mean, std = (torch.tensor(v, dtype=wide, device=image.device).view(-1, 1, 1) for v in self.normalization)
        return ((image.to(wide) - mean) / std).float()

    def outputs(self, images: torch.Tensor, annotation: bool = True) -> Outputs:
        """All outputs of the network, for the losses, pictures, export, cost and diagnosis.

        Args:
            images: (N, 3, H, W) normalised, as :meth:`preprocess_image` makes them.
            annotation: False leaves the annotation logits out.
        """
        return self.sem_seg_head(self.backbone(images), images, annotation)

    def compute_losses(self, outputs: Outputs, targets: Targets, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The training losses by name, times their weights; ``outputs`` belong to ``images``."""
        inside = (targets.scribble != IGNORED).sum().clamp(min=1)
        log_scalar("annotated_share", (targets.scribble < self.num_classes).sum() / inside)
        with torch.autocast(images.device.type, enabled=False):
            return {name: loss.loss_weight * loss(outputs, targets, images) for name, loss in self.losses.items()}

    def loss_weights(self, batched_inputs: list[dict]) -> dict[str, float]:
        """The number over which each training loss is a mean. With these weights the losses of the parts of a batch, in
        turn or in several processes, add up to the loss of the whole; see :meth:`Loss.mean_over`."""
        return {name: loss.mean_over(batched_inputs) for name, loss in self.losses.items()}

    @property
    def self_training(self) -> bool:
        """Whether pseudo labels are used now. Detectron2's event storage counts the iterations, also after a resume."""
        iteration = get_event_storage().iter if has_event_storage() else 0
        return self.self_training_start is not None and iteration >= self.self_training_start

    def _labels(self, batched_inputs: list[dict], images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scribble and image classes of :class:`Targets`."""
        scribble = images.new_full((len(images), *images.shape[-2:]), IGNORED, dtype=torch.long)
        for target, x in zip(scribble, batched_inputs, strict=True):
            height, width = x["scribble"].shape
            target[:height, :width] = x["scribble"]
        return scribble, torch.stack([x["image_classes"] for x in batched_inputs]).to(self.device)

    def _targets(self, outputs: Outputs, scribble: torch.Tensor, image_classes: torch.Tensor) -> Targets:
        supervision = scribble
        if self.self_training:
            supervision = pseudo_labels(outputs.logits, scribble, image_classes, self.self_training_threshold)
        return Targets(scribble, image_classes, supervision)

    @torch.no_grad()
    def inspect(self, batched_inputs: list[dict]) -> list[dict[str, torch.Tensor]]:
        """Maps for pictures of what the method computes. The training or evaluation mode stays as it is.

        Args:
            batched_inputs: as :meth:`forward` takes them; ``scribble`` and ``image_classes`` are optional.

        Returns:
            a dict an image, at the image's own size (H, W): ``sem_seg`` (C, H, W) logits and
            ``annotation_prob`` (C + 1, H, W), the last channel "not annotated"; with a scribble also
            ``blp_weight`` (H, W), 0 where there is no annotation, and ``pseudo_label`` (H, W) long, 255 = none.
        """
        images = self.preprocess_image(batched_inputs)
        outputs = self.outputs(images.tensor)
        size = images.tensor.shape[-2:]
        maps = {
            "sem_seg": upsample(outputs.logits, size),
            "annotation_prob": upsample(outputs.annotation_logits, size).softmax(dim=1),
        }
        if all("scribble" in x for x in batched_inputs):
            labels = self._labels(batched_inputs, images.tensor)
            pseudo = pseudo_labels(outputs.logits, *labels, self.self_training_threshold)
            loss = self.losses["loss_seg"] if "loss_seg" in self.losses else next(iter(self.losses.values()))
            maps["blp_weight"] = loss.pixel_weights(outputs, Targets(*labels, pseudo))
            maps["pseudo_label"] = pseudo
        return [
            {name: value[i, ..., :height, :width] for name, value in maps.items()}
            for i, (height, width) in enumerate(images.image_sizes)
        ]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        for name in list(state_dict):
            state_dict[current_name(name, prefix)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)
