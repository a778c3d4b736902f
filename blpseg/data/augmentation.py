"""Training augmentation: flip, scale, rotation, crop with padding, photometric jitter (METHOD.md section 6)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from torchvision.transforms import functional as photometric

from ..utils.errors import BLPSegError
from ..utils.labels import IGNORED

_FLIP_CODES = {"horizontal": 1, "vertical": 0, "none": None}  # of cv2.flip
_JITTERED = ("brightness", "contrast", "saturation", "hue")


class TrainingAugmentation:
    """Flip, scale, rotate (option), crop or pad, jitter the colours (option): an image and its label map.

    Image pixels are interpolated with cubic convolution on 8 bits, so that overshoot at edges saturates at 0 and
    255 as in any stored image, labels take the nearest pixel (of pixel centres, as the image does). Outside the
    image the result is the mean colour, exactly 0 after the model's normalisation, which is why it is float32,
    and the label is 255.

    Every call draws the same count of random numbers, whatever is switched on, so colour jitter does not move the
    crops.
    """

    @configurable
    def __init__(
        self,
        *,
        flip: str,
        scale_range: Sequence[float],
        rotation_degrees: float,
        crop_size: Sequence[int] | None,
        color_jitter: dict[str, float],
        pixel_mean: Sequence[float],
        image_format: str,
        longest_side: int = 0,
    ):
        """
        Args:
            flip: "horizontal", "vertical" (each with probability 0.5) or "none".
            scale_range: (least, largest) scale, uniform; sides are rounded.
            rotation_degrees: uniform in +- this, about the centre, on a canvas of the same size.
            crop_size: (height, width), or None to keep the size.
            color_jitter: strength of "brightness", "contrast", "saturation": factor uniform in 1 +- strength;
                "hue": shift uniform in +- strength turns of the colour circle.
            pixel_mean: of the three channels in 0..255, the colour of padding.
            image_format: "RGB" or "BGR".
            longest_side: an image that is longer is first taken to be scaled to it; 0 for none.
        """
        self.longest_side = longest_side
        self.flip_code = _FLIP_CODES[flip]
        self.scale_range = tuple(scale_range)
        self.rotation_degrees = rotation_degrees
        self.crop_size = None if crop_size is None else tuple(int(v) for v in crop_size)
        self.color_jitter = dict(color_jitter)
        self.pixel_mean = np.asarray(pixel_mean, np.float32)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        crop = cfg.INPUT.CROP
        if crop.ENABLED and (crop.TYPE != "absolute" or any(side != int(side) for side in crop.SIZE)):
            raise BLPSegError(
                f"INPUT.CROP.TYPE {crop.TYPE!r} and SIZE {list(crop.SIZE)}: BLPSeg crops to whole pixels, 'absolute'"
            )
        return {
            "flip": cfg.INPUT.RANDOM_FLIP,
            "scale_range": cfg.INPUT.SCALE_RANGE,
            "rotation_degrees": cfg.INPUT.ROTATION_DEGREES,
            "crop_size": crop.SIZE if crop.ENABLED else None,
            "color_jitter": {name: cfg.INPUT.COLOR_JITTER[name.upper()] for name in _JITTERED},
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "image_format": cfg.INPUT.FORMAT,
            "longest_side": cfg.INPUT.LONGEST_SIDE,
        }

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            image: (H, W, 3) uint8.
            label: (H, W) uint8 without the value 255.
            rng: nine numbers are drawn from it.

        Returns:
            (3, h, w) float32 in 0..255 and (h, w) uint8, 255 where the image is padded; (h, w) is the crop size.
        """
        u_flip, u_scale, u_angle, u_top, u_left, *u_jitter = rng.random(9)
        if self.flip_code is not None and u_flip < 0.5:
            image, label = cv2.flip(image, self.flip_code), cv2.flip(label, self.flip_code)

        least, largest = self.scale_range
        scale = (least + (largest - least) * u_scale) * relative_scale(label.shape, self.longest_side)
        height, width = (max(1, round(side * scale)) for side in label.shape)
        if (height, width) != label.shape:
            # The cubic kernel of METHOD sees four pixels a side: enough down to a half, not for a large photograph.
            reduces = self.longest_side and scale < 1
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if reduces else cv2.INTER_CUBIC)
            label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)

        angle = self.rotation_degrees * (2 * u_angle - 1)
        if angle:
            image, label = _rotate(image, label, angle)

        crop_height, crop_width = self.crop_size or (height, width)
        source_y, target_y = _place(height, crop_height, u_top)
        source_x, target_x = _place(width, crop_width, u_left)
        planes = cv2.split(image[source_y, source_x])
        if any(self.color_jitter.values()):
            planes = self._jitter(np.stack(planes), u_jitter)

        label_out = np.full((crop_height, crop_width), IGNORED, np.uint8)
        label_out[target_y, target_x] = label[source_y, source_x]
        image_out = np.empty((3, crop_height, crop_width), np.float32)
        for channel, plane, mean in zip(image_out, planes, self.pixel_mean, strict=True):
            if plane.shape != channel.shape:
                channel[:] = mean
            channel[target_y, target_x] = plane
            if angle:
                channel[label_out == IGNORED] = mean
        return image_out, label_out

    def _jitter(self, planes: np.ndarray, draws: Sequence[float]) -> np.ndarray:
        image = torch.from_numpy(planes)
        if self.image_format == "BGR":
            image = image.flip(0)
        for (name, strength), draw in zip(self.color_jitter.items(), draws, strict=True):
            if strength:
                centre = 0.0 if name == "hue" else 1.0
                image = getattr(photometric, f"adjust_{name}")(image, centre + strength * (2 * draw - 1))
        if self.image_format == "BGR":
            image = image.flip(0)
        return image.numpy()


def relative_scale(size: Sequence[int], longest_side: int) -> float:
    """The factor, at most 1, by which an image of ``size`` (height, width) fits ``longest_side``; 1 for 0."""
    return min(1.0, longest_side / max(size)) if longest_side else 1.0


def _rotate(image: np.ndarray, label: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    height, width = label.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    # The replicated border keeps foreign colours out of the cubic kernel; the label says what lies outside.
    image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    label = cv2.warpAffine(label, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=IGNORED)
    return image, label


def _place(side: int, crop: int, draw: float) -> tuple[slice, slice]:
    """Where to cut a side and where to put it: a random window of a long side, a random offset for a short one."""
    offset = int(draw * (abs(side - crop) + 1))
    if side >= crop:
        return slice(offset, offset + crop), slice(0, crop)
    return slice(0, side), slice(offset, offset + side)
