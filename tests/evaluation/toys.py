"""A stand-in model with known answers and small images for it."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import nn

CLASSES = ["ground", "disc", "bar", "never"]
COLORS = [(0, 0, 0), (200, 30, 30), (30, 200, 30), (30, 30, 200)]
IGNORE = 255


class ColorModel(nn.Module):
    """Logits from a fixed 3 x 3 convolution of the normalised image: sees neighbours, so mirror and tiles matter."""

    def __init__(self, num_classes: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_classes, 3, 3, 3, generator=generator))
        self.calls = []

    def forward(self, batched_inputs):
        self.calls.append([tuple(x["image"].shape) for x in batched_inputs])
        results = []
        for x in batched_inputs:
            image = (x["image"].float() - 120) / 60
            logits = F.conv2d(image[None], self.weight, padding=1)
            size = (x.get("height", image.shape[1]), x.get("width", image.shape[2]))
            results.append({"sem_seg": F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]})
        return results


def make_image(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: smooth colour noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def make_mask(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W) uint8: a disc (1), a thin bar (2), some ignored pixels; class 3 never occurs."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    cv2.circle(mask, tuple(int(v) for v in rng.integers(10, (width - 10, height - 10))), 9, 1, -1)
    column = int(rng.integers(2, width - 4))
    mask[:, column : column + 3] = 2
    mask[0] = IGNORE
    return mask


def load_inputs(records):
    """Records as the test loader gives them: with ``image`` (3, H, W) uint8 RGB."""
    inputs = []
    for record in records:
        with PathManager.open(record["file_name"], "rb") as file:
            image = np.array(Image.open(file))
        inputs.append({**record, "image": torch.from_numpy(image).permute(2, 0, 1)})
    return inputs
