"""A data set of a few small images, a config for it, and the command line as a fixture."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from .door import Run

CONFIG = """
MODEL:
  META_ARCHITECTURE: BLPSeg
  DEVICE: cpu
  WEIGHTS: ""
  PIXEL_MEAN: [128.0, 128.0, 128.0]
  PIXEL_STD: [60.0, 60.0, 60.0]
  BACKBONE:
    NAME: build_tiny_backbone
    FREEZE_AT: 0
  RESNETS:
    NORM: BN
  SEM_SEG_HEAD:
    NAME: BLPSegHead
    NUM_CLASSES: 3
    IN_FEATURES: []
    CONVS_DIM: 8
    NORM: BN
  BLPSEG:
    HEAD_CHANNELS: 8
    LAM:
      EMBEDDING_CHANNELS: 8
    SELF_TRAINING:
      START_ITER: 4
      THRESHOLD: 0.4
INPUT:
  FORMAT: RGB
  RANDOM_FLIP: horizontal
  CROP:
    ENABLED: True
    TYPE: absolute
    SIZE: [32, 32]
DATASETS:
  TRAIN: ("tiny_train",)
  TEST: ("tiny_val",)
  FOLDER:
    NAME: tiny
    ROOT: {root}
    CLASSES: [background, disc, square]
    TRAIN_MASKS: masks/train
DATALOADER:
  NUM_WORKERS: 0
SOLVER:
  IMS_PER_BATCH: 4
  BASE_LR: 0.003
  MAX_ITER: 8
  WARMUP_ITERS: 0
  CHECKPOINT_PERIOD: 3
  LR_SCHEDULER_NAME: WarmupPolyLR
TEST:
  EVAL_PERIOD: 0
OUTPUT:
  LOG_PERIOD: 1
  PANEL_PERIOD: 0
SEED: 7
VERSION: 2
"""


def _scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (40, 44, 3), mask and scribble (40, 44), of a disc and a square."""
    mask = np.zeros((40, 44), np.uint8)
    cv2.circle(mask, (int(rng.integers(8, 14)), int(rng.integers(10, 30))), 7, 1, -1)
    x, y = int(rng.integers(24, 32)), int(rng.integers(4, 26))
    cv2.rectangle(mask, (x, y), (x + 10, y + 10), 2, -1)
    image = np.array([[40, 60, 90], [200, 60, 60], [60, 60, 200]], np.uint8)[mask]
    image = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    scribble = np.full_like(mask, 255)
    for label in range(3):
        rows, columns = np.nonzero(mask == label)
        chosen = rng.integers(0, len(rows), 12)
        scribble[rows[chosen], columns[chosen]] = label
    return image, mask, scribble


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 5)):
        for part in ("images", "masks", "scribbles"):
            (root / part / split).mkdir(parents=True)
        for k in range(count):
            image, mask, scribble = _scene(rng)
            for part, array in (("images", image), ("masks", mask), ("scribbles", scribble)):
                cv2.imwrite(str(root / part / split / f"{split}{k}.png"), array)
    return root


@pytest.fixture(scope="session")
def config_file(data_root) -> Path:
    path = data_root / "toy.yaml"
    path.write_text(CONFIG.format(root=data_root))
    return path


@pytest.fixture
def door(config_file, tmp_path):
    """``door(*arguments, prelude="")`` starts tools/train_net.py with the config; :class:`Run`."""
    runs: list[Run] = []
    numbers = itertools.count()

    def start(*arguments, prelude: str = "", config: Path = config_file) -> Run:
        output = tmp_path / f"output{next(numbers)}.txt"
        runs.append(Run(["--config-file", config, *arguments], output, prelude))
        return runs[-1]

    yield start
    for run in runs:
        if run._process.is_alive():
            run.kill_all()
