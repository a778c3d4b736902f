"""Multi-scale, mirrored and tiled inference around a segmentation model (METHOD section 7)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data.augmentation import relative_scale
from ..utils.errors import BLPSegError


def class_map(sem_seg: torch.Tensor) -> torch.Tensor:
    """(C, H, W) logits or a finished (H, W) class map -> (H, W) class map, uint8 (int64 beyond 256 classes)."""
    if sem_seg.dim() == 2:
        return sem_seg
    # On a CPU `max` along the first dimension is four times as fast as `argmax`.
    classes = sem_seg.max(dim=0).indices
    return classes.to(torch.uint8) if len(sem_seg) <= 256 else classes


class Inference(nn.Module):
    """A segmentation model with test-time views and tiles; it is called like the model itself.

    Without mirror, scales and tiles the result is the model's own. Otherwise an image is resized by cubic
    interpolation (OpenCV's ``INTER_CUBIC``), the image and its mirror share one forward, the logits are
    resized to the image's size (align_corners=True), mirrored back and averaged as logits.
    The model normalises; cubic weights sum to one, so resizing before or after is the same.

    Images above a number of pixels are cut into overlapping tiles of one size. Each pixel is taken from the
    tile in which it lies deepest. Memory then depends on the tile, and on the image only through the result.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        tile_above: int = 0,
        tile_size: int = 512,
        tile_overlap: int = 128,
        longest_side: int = 0,
        classes_only: bool = False,
        annotated: bool = False,
    ):
        """
        Args:
            model: takes a list of ``{"image": (3, H, W)}``, returns a list of ``{"sem_seg": (C, H, W) logits}``.
                A DistributedDataParallel wrapper is taken off: processes see different numbers of images.
            scales: sizes relative to the image; a scaled side is rounded and at least one pixel.
            flip: average with the mirror image.
            tile_above: images of more pixels are tiled; 0 for never.
            tile_size, tile_overlap: side of a tile and the least overlap of neighbours, pixels of the image.
            longest_side: scales are relative to an image of at most this side; 0 for the image as it is.
            classes_only: return (H, W) uint8 class maps instead of logits: one byte for each pixel.
            annotated: return how probable annotation is as well, where the model has BLPSeg's ``inspect``.

        Raises:
            BLPSegError: the overlap is not smaller than a tile.
        """
        super().__init__()
        if tile_above and not 0 <= tile_overlap < tile_size:
            raise BLPSegError(f"TEST.TILE.OVERLAP: {tile_overlap} must be in 0..TEST.TILE.SIZE - 1 ({tile_size - 1})")
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.scales = tuple(scales)
        self.flip = flip
        self.tile_above = tile_above
        self.tile_size = tile_size
        self.tile_overlap = tile_overlap
        self.longest_side = longest_side
        self.classes_only = classes_only
        self.annotated = annotated and hasattr(self.model, "inspect")
        self.training = model.training  # Detectron2's inference_context restores what it finds here

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module, **options) -> Inference:
        """``TEST.AUG.*`` and ``TEST.TILE.*`` of a config around ``model``; ``options`` are further arguments."""
        augment = cfg.TEST.AUG.ENABLED
        return cls(
            model,
            scales=cfg.TEST.AUG.SCALES if augment else (1.0,),
            flip=augment and cfg.TEST.AUG.FLIP,
            tile_above=cfg.TEST.TILE.ABOVE,
            tile_size=cfg.TEST.TILE.SIZE,
            tile_overlap=cfg.TEST.TILE.OVERLAP,
            longest_side=cfg.INPUT.LONGEST_SIDE,
            **options,
        )

    @property
    def views(self) -> int:
        """How many forwards of one image are averaged."""
        return len(self.scales) * (1 + self.flip)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict[str, torch.Tensor]]:
        """
        Args:
            batched_inputs: dicts with ``image`` (3, H, W), 0..255, and optionally ``height`` and ``width`` of
                the result. Images of one size share their forwards.

        Returns:
            a list of ``{"sem_seg": (C, height, width) float32 logits}``, or of (height, width) uint8 class
            maps with ``classes_only``; with ``annotated`` also ``"annotated"``, (height, width) float32 in 0..1.
        """
        results: list[dict | None] = [None] * len(batched_inputs)
        groups: dict[tuple, list[int]] = {}
        for i, x in enumerate(batched_inputs):
            height, width = x["image"].shape[-2:]
            sizes = (height, width), (x.get("height", height), x.get("width", width))
            groups.setdefault(sizes, []).append(i)
        for (image_size, result_size), members in groups.items():
            ratio = relative_scale(image_size, self.longest_side)
            scales = [scale * ratio for scale in self.scales]
            if self.tile_above and math.prod(image_size) * ratio**2 > self.tile_above:
                maps = [self._tiled(batched_inputs[i]["image"], result_size, scales) for i in members]
            elif not self.flip and scales == [1.0]:
                outputs = self.model([batched_inputs[i] for i in members])
                maps = [self._finish(output["sem_seg"]) for output in outputs]
            else:
                images = self._to_device(torch.stack([batched_inputs[i]["image"] for i in members]))
                maps = [self._finish(logits) for logits in self._average(images, result_size, scales)]
            for i, sem_seg in zip(members, maps, strict=True):
                results[i] = {"sem_seg": sem_seg}
                if self.annotated:
                    image = batched_inputs[i]["image"]
                    results[i]["annotated"] = 1 - self.annotation_prob(image, result_size, slice(-1, None))[0]
        return results

    def _to_device(self, image: torch.Tensor) -> torch.Tensor:
        """Move it to the model's device, where scaling and mirroring are done too."""
        return image.to(next(self.model.parameters(), image).device)

    def _finish(self, logits: torch.Tensor) -> torch.Tensor:
        return class_map(logits) if self.classes_only else logits

    def _average(self, images: torch.Tensor, size: tuple[int, int], scales: Sequence[float]) -> torch.Tensor:
        """(N, 3, H, W) images of one size -> (N, C, *size) logits averaged over the views."""
        total = None
        for scale in scales:
            logits = self._view(images, scale, size)
            total = logits if total is None else total.add_(logits)
        return total.div_(len(scales)) if len(scales) > 1 else total

    def _view(self, images: torch.Tensor, scale: float, size: tuple[int, int]) -> torch.Tensor:
        scaled = images.float()
        scaled_size = tuple(max(1, round(side * scale)) for side in images.shape[-2:])
        if scaled_size != images.shape[-2:]:
            scaled = F.interpolate(
                scaled, size=scaled_size, mode="bicubic", align_corners=False, antialias=self.longest_side > 0
            )
        views = [*scaled, *scaled.flip(-1)] if self.flip else [*scaled]
        maps = [output["sem_seg"] for output in self.model([{"image": view} for view in views])]
        if self.flip:
            # Resizing is linear and symmetric: averaging the pair first saves half of it.
            pairs = zip(maps[: len(scaled)], maps[len(scaled) :], strict=True)
            maps = [mirrored.flip(-1).add_(straight).div_(2) for straight, mirrored in pairs]
        logits = torch.stack(maps)
        del maps
        if logits.shape[-2:] == size:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)

    def annotation_prob(
        self, image: torch.Tensor, size: tuple[int, int], channels: slice = slice(None)
    ) -> torch.Tensor:
        """(3, H, W), 0..255 -> (C + 1, *size) float32: the annotation head's probabilities, "not annotated" last.

        Of these ``channels``, where not all are needed: at the size of a large image each takes much memory.
        From one view, at the middle one of the scales, and smaller where the image has more pixels than a tile takes.
        """
        height, width = image.shape[-2:]
        scale = sorted(self.scales)[len(self.scales) // 2] * relative_scale((height, width), self.longest_side)
        if self.tile_above:
            scale = min(scale, math.sqrt(self.tile_above / (height * width)))
        scaled_size = [max(1, round(height * scale)), max(1, round(width * scale))]
        view = F.interpolate(self._to_device(image)[None].float(), scaled_size, mode="bilinear", antialias=True)[0]
        (maps,) = self.model.inspect([{"image": view}])
        return F.interpolate(maps["annotation_prob"][None, channels].float(), size, mode="bilinear")[0]

    def _tiled(self, image: torch.Tensor, size: tuple[int, int], scales: Sequence[float]) -> torch.Tensor:
        """(3, H, W) -> (C, *size) logits, or the class map, put together from tiles."""
        height, width = image.shape[-2:]
        image, result = self._to_device(image), None
        for rows, kept_rows in tile_windows(height, self.tile_size, self.tile_overlap):
            for columns, kept_columns in tile_windows(width, self.tile_size, self.tile_overlap):
                tile = image[None, :, rows, columns]
                (logits,) = self._average(tile, tile.shape[-2:], scales)
                inside = logits[
                    :,
                    kept_rows.start - rows.start : kept_rows.stop - rows.start,
                    kept_columns.start - columns.start : kept_columns.stop - columns.start,
                ]
                piece = self._finish(inside)
                if result is None:
                    result = piece.new_empty((*piece.shape[:-2], height, width))
                result[..., kept_rows, kept_columns] = piece
        if (height, width) == size:
            return result
        if result.dim() == 2:
            return F.interpolate(result[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(result.dtype)
        return F.interpolate(result[None], size=size, mode="bilinear", align_corners=True)[0]


def tile_windows(length: int, size: int, overlap: int) -> Iterator[tuple[slice, slice]]:
    """Cut ``length`` pixels into windows of ``size`` that overlap by at least ``overlap``.

    Yields:
        (window, kept): the slice to segment and the part of it to keep. The kept parts follow each other
        without gap or overlap; where two windows meet, each keeps half of what they share.
    """
    if length <= size:
        yield slice(0, length), slice(0, length)
        return
    count = math.ceil((length - overlap) / (size - overlap))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    cuts = [0, *((left + size + right) // 2 for left, right in zip(starts, starts[1:], strict=False)), length]
    for start, first, last in zip(starts, cuts, cuts[1:], strict=False):
        yield slice(start, start + size), slice(first, last)
