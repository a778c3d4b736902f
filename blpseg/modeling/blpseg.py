"""The meta-architecture: METHOD section 2's parts, wired."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from .heads import PixelHead, ShallowEmbedding
from .local_aggregation import local_aggregation
from .losses import PADDING, annotation_loss, blp_weight, build_segmentation_loss, upsample
from .pixel_decoder import build_pixel_decoder
from .pseudo_labels import pseudo_labels
from .regularizers import build_regularizers

__all__ = ["BLPSeg"]

LOG_PERIOD = 20  # iterations between scalars; each costs a wait for the GPU, and writers look this often


@META_ARCH_REGISTRY.register()
class BLPSeg(nn.Module):
    """BLPSeg (Wang et al., IEEE TIP 2023): a segmentation network that also predicts where annotators scribble.

    Detectron2 counterpart: :class:`detectron2.modeling.SemanticSegmentor`.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_decoder: nn.Module,
        sem_seg_head: nn.Module,
        annotation_head: nn.Module,
        embedding: nn.Module | None,
        segmentation_loss: nn.Module,
        regularizers: nn.ModuleDict,
        num_classes: int,
        unannotated_weight: float,
        lam_sigma: float,
        lam_impl: str,
        lam_window: float,
        self_training_start: int | None,
        self_training_threshold: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            backbone: image -> dict of feature maps.
            pixel_decoder: feature maps -> (N, D, H/4, W/4).
            sem_seg_head: decoder output -> (N, C, H/4, W/4) logits.
            annotation_head: decoder output -> (N, C + 1, H/4, W/4) logits.
            embedding: image -> (N, E, H/4, W/4) features of local aggregation; None leaves the aggregation out.
            segmentation_loss: from ``SEGMENTATION_LOSS_REGISTRY``.
            regularizers: further losses by name, see :func:`build_regularizers`; may be empty.
            num_classes: C, background included.
            unannotated_weight: see :func:`annotation_loss`.
            lam_sigma, lam_impl, lam_window: see :func:`local_aggregation`.
            self_training_start: first iteration with pseudo labels; None for never.
            self_training_threshold: see :func:`pseudo_labels`.
            pixel_mean, pixel_std: normalisation of a channel in 0..255, in the order of INPUT.FORMAT.
        """
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.sem_seg_head = sem_seg_head
        self.annotation_head = annotation_head
        self.embedding = embedding
        self.segmentation_loss = segmentation_loss
        self.regularizers = regularizers
        self.num_classes = num_classes
        self.unannotated_weight = unannotated_weight
        self.lam_sigma = lam_sigma
        self.lam_impl = lam_impl
        self.lam_window = lam_window
        self.self_training_start = self_training_start
        self.self_training_threshold = self_training_threshold
        self.normalization = (tuple(pixel_mean), tuple(pixel_std))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        blpseg = cfg.MODEL.BLPSEG
        num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        backbone = build_backbone(cfg)
        decoder = build_pixel_decoder(cfg, backbone.output_shape())
        return {
            "backbone": backbone,
            "pixel_decoder": decoder,
            "sem_seg_head": PixelHead(decoder.out_channels, blpseg.HEAD_CHANNELS, num_classes),
            "annotation_head": PixelHead(decoder.out_channels, blpseg.HEAD_CHANNELS, num_classes + 1),
            "embedding": ShallowEmbedding(blpseg.LAM.EMBEDDING_CHANNELS) if blpseg.LAM.ENABLED else None,
            "segmentation_loss": build_segmentation_loss(cfg),
            "regularizers": build_regularizers(cfg),
            "num_classes": num_classes,
            "unannotated_weight": blpseg.ANNOTATION.UNANNOTATED_WEIGHT,
            "lam_sigma": blpseg.LAM.SIGMA,
            "lam_impl": blpseg.LAM.IMPL,
            "lam_window": blpseg.LAM.WINDOW,
            "self_training_start": blpseg.SELF_TRAINING.START_ITER if blpseg.SELF_TRAINING.ENABLED else None,
            "self_training_threshold": blpseg.SELF_TRAINING.THRESHOLD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """
        Args:
            batched_inputs: a dict an image with

                * ``image``: (3, H, W), 0..255, channels in the order of INPUT.FORMAT; sizes may differ.
                * ``scribble`` (training): (H, W) long; 0..C-1 annotated, C not annotated, 255 padding.
                * ``image_classes`` (training): (C,) bool, classes present in the image, background always.
                * ``height``, ``width`` (inference, optional): the size of the result.

        Returns:
            in training ``{"loss_seg", "loss_annotation"}`` and those of ``MODEL.BLPSEG.REGULARIZERS``, scalars;
            otherwise a list of ``{"sem_seg": (C, height, width) float32 logits}``.
        """
        images = self._preprocess(batched_inputs)
        # Before the forward, all of which a copy to the GPU would wait for.
        targets = self._targets(batched_inputs, images.tensor) if self.training else ()
        decoded, logits = self._segment(images.tensor)
        if self.training:
            return self._losses(images.tensor, decoded, logits, *targets)
        return [
            {"sem_seg": result}
            for result in self._postprocess(upsample(logits, images.tensor.shape[-2:]), images, batched_inputs)
        ]

    def _preprocess(self, batched_inputs: list[dict]) -> ImageList:
        images = [self._normalize(x["image"].to(self.device)) for x in batched_inputs]
        # Padding after normalisation is the mean colour, as in the crops of training.
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def _normalize(self, image: torch.Tensor) -> torch.Tensor:
        """In float64 and rounded once, as the published loader does it: a pseudo label near its threshold tells."""
        wide = torch.float32 if image.device.type == "mps" else torch.float64  # what Metal does not have
        mean, std = (torch.tensor(v, dtype=wide, device=image.device).view(-1, 1, 1) for v in self.normalization)
        return ((image.to(wide) - mean) / std).float()

    def _segment(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, H, W) normalised -> decoder output and aggregated logits, both at stride 4."""
        decoded = self.pixel_decoder(self.backbone(images))
        logits = self.sem_seg_head(decoded)
        if self.embedding is not None:
            logits = local_aggregation(
                logits, self.embedding(images), self.lam_sigma, impl=self.lam_impl, window=self.lam_window
            )
        return decoded, logits

    def _targets(self, batched_inputs: list[dict], images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scribble = images.new_full((len(images), *images.shape[-2:]), PADDING, dtype=torch.long)
        for target, x in zip(scribble, batched_inputs, strict=True):
            height, width = x["scribble"].shape
            target[:height, :width] = x["scribble"]
        return scribble, torch.stack([x["image_classes"] for x in batched_inputs]).to(self.device)

    def _losses(self, images, decoded, logits, scribble, image_classes) -> dict[str, torch.Tensor]:
        # Detached: where people scribble must not shape the features that segment (METHOD section 2).
        annotation_logits = self.annotation_head(decoded.detach())
        if self.self_training:
            target = pseudo_labels(logits, scribble, image_classes, self.self_training_threshold)
        else:
            target = scribble
        loss_seg, scalars = self.segmentation_loss(logits, annotation_logits, target, images)
        if has_event_storage() and get_event_storage().iter % LOG_PERIOD == 0:
            inside = (scribble != PADDING).sum().clamp(min=1)
            scalars["annotated_share"] = (scribble < self.num_classes).sum() / inside
            for name, value in scalars.items():
                get_event_storage().put_scalar(f"blpseg/{name}", float(value), smoothing_hint=False)
        return {
            "loss_seg": loss_seg,
            "loss_annotation": annotation_loss(annotation_logits, scribble, self.unannotated_weight),
            **{name: regularizer(logits, images, scribble) for name, regularizer in self.regularizers.items()},
        }

    def loss_weights(self, batched_inputs: list[dict]) -> dict[str, float]:
        """What each training loss is a mean over, so that parts of a batch, in turn or in several processes, can
        add up to the loss of the whole: images for ``loss_seg``, weighted pixels for ``loss_annotation``. The
        regularizers are means over images, as the trainer takes losses that are not named here to be."""
        annotated = sum(int((x["scribble"] < self.num_classes).sum()) for x in batched_inputs)
        free = sum(int((x["scribble"] == self.num_classes).sum()) for x in batched_inputs)
        return {
            "loss_seg": float(len(batched_inputs)),
            "loss_annotation": annotated + self.unannotated_weight * free,
        }

    @property
    def self_training(self) -> bool:
        """Whether pseudo labels are used now. Detectron2's event storage counts the iterations, also after a resume."""
        iteration = get_event_storage().iter if has_event_storage() else 0
        return self.self_training_start is not None and iteration >= self.self_training_start

    def _postprocess(self, maps: torch.Tensor, images: ImageList, batched_inputs: list[dict]) -> list[torch.Tensor]:
        """(N, K, H, W) maps of the padded batch -> one (K, height, width) an image."""
        return [
            sem_seg_postprocess(m, size, x.get("height", size[0]), x.get("width", size[1]))
            for m, size, x in zip(maps, images.image_sizes, batched_inputs, strict=True)
        ]

    @torch.no_grad()
    def embed(self, batched_inputs: list[dict]) -> torch.Tensor | None:
        """(N, E, h, w) features of local aggregation at stride 4, of the padded batch; None without aggregation."""
        return None if self.embedding is None else self.embedding(self._preprocess(batched_inputs).tensor)

    @torch.no_grad()
    def inspect(self, batched_inputs: list[dict]) -> list[dict[str, torch.Tensor]]:
        """What the method sees, for pictures; training or evaluation mode is left as it is.

        Args:
            batched_inputs: as :meth:`forward` takes them; ``scribble`` and ``image_classes`` are optional.

        Returns:
            a dict an image, at the image's own size (H, W): ``sem_seg`` (C, H, W) logits and
            ``annotation_prob`` (C + 1, H, W), the last channel "not annotated"; with a scribble also
            ``blp_weight`` (H, W), 0 where there is no annotation, and ``pseudo_label`` (H, W) long, 255 = none.
        """
        images = self._preprocess(batched_inputs)
        decoded, stride4_logits = self._segment(images.tensor)
        size = images.tensor.shape[-2:]
        logits = upsample(stride4_logits, size)
        log_q = upsample(self.annotation_head(decoded), size).log_softmax(dim=1)
        maps = {"sem_seg": logits, "annotation_prob": log_q.exp()}
        if all("scribble" in x for x in batched_inputs):
            scribble, image_classes = self._targets(batched_inputs, images.tensor)
            annotated = scribble < self.num_classes
            label = (scribble * annotated)[:, None]
            log_p = logits.log_softmax(dim=1)
            gamma = getattr(self.segmentation_loss, "gamma", 0.0)  # a loss without one weighs all pixels alike
            weight = blp_weight(log_p.gather(1, label), log_q.gather(1, label), gamma)
            maps["blp_weight"] = weight[:, 0] * annotated
            maps["pseudo_label"] = pseudo_labels(stride4_logits, scribble, image_classes, self.self_training_threshold)
        return [
            {name: value[i, ..., :height, :width] for name, value in maps.items()}
            for i, (height, width) in enumerate(images.image_sizes)
        ]
