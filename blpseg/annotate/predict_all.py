"""What a trained model says of every photo of a project: ``python -m blpseg.annotate.predict_all CONFIG WEIGHTS ROOT``.

A process of its own, so that the server stays responsive. It prints a line a photo, and leaves for each in
ROOT/.cache/model ``log_probability`` (C, h, w), ``features`` (D, h', w') of the decoder, ``score`` and ``places``
(K, 2) as x, y: how much a scribble would teach, and where.
"""

from __future__ import annotations

import sys

import cv2
import numpy as np
import torch

from .. import Predictor, get_cfg
from ..data.augmentation import relative_scale
from ..data.datasets import splits
from ..data.project import list_images
from ..utils.cli import run_command
from ..utils.errors import BLPSegError
from ..utils.files import read_image
from .instant import STRIDE, model_path, save_arrays, working_picture

PLACES = 3
_BLUR = 0.02  # standard deviation of the window that a place is judged by, of the longer side
_APART = 0.15  # least distance of places, of the longer side


def worth(probability: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """What a scribble teaches at each pixel, 0..1: entropy times one minus the probability of being annotated.

    The model is unsure there, and it has learned that people pass such places over.

    Args:
        probability: (C, H, W).
        annotated: (H, W).
    """
    entropy = -(probability * np.log(np.maximum(probability, 1e-8))).sum(axis=0) / np.log(len(probability))
    return entropy * (1 - annotated)


def best_places(worth_map: np.ndarray, count: int = PLACES) -> np.ndarray:
    """Up to ``count`` (x, y) where a map, smoothed, is largest, apart from each other: (K, 2) int."""
    side = max(worth_map.shape)
    smooth = cv2.GaussianBlur(worth_map.astype(np.float32), (0, 0), max(1.0, _BLUR * side))
    places = []
    while len(places) < count and smooth.max() > 0:
        y, x = np.unravel_index(smooth.argmax(), smooth.shape)
        places.append((x, y))
        cv2.circle(smooth, (int(x), int(y)), max(1, round(_APART * side)), 0, -1)
    return np.array(places, int).reshape(-1, 2)


def look(predictor: Predictor, path: str) -> dict[str, np.ndarray]:
    """The arrays that are kept of one photo."""
    image = read_image(path)
    small = working_picture(image)
    grid = -(-small.shape[1] // STRIDE), -(-small.shape[0] // STRIDE)
    logits = predictor(small[..., ::-1])["logits"]
    logits = np.stack([cv2.resize(x, grid, interpolation=cv2.INTER_AREA) for x in logits])
    log_probability = torch.from_numpy(logits).log_softmax(dim=0).numpy()
    features, annotated = _inside(predictor, small)
    annotated = cv2.resize(annotated, grid, interpolation=cv2.INTER_LINEAR)
    value = worth(np.exp(log_probability), annotated)
    scale = np.array(image.shape[1::-1]) / grid
    places = ((best_places(value) + 0.5) * scale).astype(int)
    return {
        "log_probability": log_probability.astype(np.float16),
        "features": features.astype(np.float16),
        "score": np.float32(value.mean()),
        "places": places,
    }


@torch.no_grad()
def _inside(predictor: Predictor, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decoder features and the probability of being annotated, in one view at the scale of training."""
    cfg, model = predictor.cfg, predictor.model
    scale = relative_scale(image.shape[:2], cfg.INPUT.LONGEST_SIDE) * (
        max(cfg.TEST.AUG.SCALES) if cfg.TEST.AUG.ENABLED else 1
    )
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    image = image if cfg.INPUT.FORMAT == "RGB" else image[..., ::-1].copy()
    padded = model.preprocess_image([{"image": torch.from_numpy(image).permute(2, 0, 1)}]).tensor
    outputs = model.outputs(padded)
    rows, columns = (-(-side * n // whole) for side, n, whole in
                     zip((height, width), outputs.features.shape[-2:], padded.shape[-2:], strict=True))  # fmt: skip
    annotated = 1 - outputs.annotation_logits.softmax(dim=1)[0, -1]
    features = outputs.features[0, :, :rows, :columns]
    return features.float().cpu().numpy(), annotated[:rows, :columns].float().cpu().numpy()


def main(config: str, weights: str, root: str) -> None:
    opts = ["DATASETS.FOLDER.ROOT", root, "MODEL.WEIGHTS", weights]
    cfg = get_cfg(config, opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    predictor = Predictor(cfg)
    photos = list_images(splits()[cfg.DATASETS.TRAIN[0]].path("images"))
    for stem, path in photos.items():
        try:
            save_arrays(model_path(root, stem), **look(predictor, str(path)))
        except BLPSegError as error:
            print(f"left out: {error}", file=sys.stderr)
        print(stem, flush=True)


if __name__ == "__main__":
    run_command(main, *sys.argv[1:])
