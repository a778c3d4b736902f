"""A dataset record -> tensors for the model (METHOD.md section 6)."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog

from ..utils.errors import BLPSegError
from ..utils.files import read_image, read_label_of
from ..utils.labels import MOST_CLASSES, UNANNOTATED
from .augmentation import TrainingAugmentation

# INPUT.SUPERVISION -> the record's field that names the label
LABEL_FILES = {"scribble": "scribble_file_name", "dense": "sem_seg_file_name"}


class ScribbleDatasetMapper:
    """Read a record's files and turn them into the model's input; counterpart of Detectron2's DatasetMapper.

    Training: ``image`` (3, h, w) float32 in 0..255 and ``scribble`` (h, w) int64: 0..C-1 a class, C not annotated,
    255 padding, both augmented, and ``image_classes`` (C,) bool: the classes of the whole label before augmentation,
    class 0 always. Otherwise ``image`` (3, H, W) uint8 at its own size. The record's fields pass through.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        num_classes: int,
        image_format: str,
        supervision: str = "scribble",
        ignore_label: int = UNANNOTATED,
        augmentation: TrainingAugmentation | None = None,
    ):
        """
        Args:
            is_train: whether to read labels and augment.
            num_classes: C, background included; at most 254, since C itself and 255 are taken.
            image_format: "RGB" or "BGR".
            supervision: "scribble" trains on ``scribble_file_name``, "dense" on ``sem_seg_file_name``, whose
                ignored pixels count as not annotated.
            ignore_label: value of dense masks without a class, beside 255.
            augmentation: needed when training.
        """
        if not 2 <= num_classes <= MOST_CLASSES:
            raise BLPSegError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {num_classes}: 2 to {MOST_CLASSES} are possible with 8-bit labels"
            )
        self.is_train = is_train
        self.num_classes = num_classes
        self.image_format = image_format
        self.supervision = supervision
        self.augmentation = augmentation
        self._labelled = np.ones(256, bool)
        self._labelled[[UNANNOTATED] if supervision == "scribble" else [UNANNOTATED, ignore_label]] = False
        self._table = np.where(self._labelled, np.arange(256), num_classes).astype(np.uint8)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        arguments = {
            "is_train": is_train,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "image_format": cfg.INPUT.FORMAT,
        }
        if is_train:
            labels = {MetadataCatalog.get(name).get("ignore_label", UNANNOTATED) for name in cfg.DATASETS.TRAIN}
            if cfg.INPUT.SUPERVISION == "dense" and len(labels) > 1:
                raise BLPSegError(
                    f"DATASETS.TRAIN {cfg.DATASETS.TRAIN}: their masks have different ignore labels {labels}"
                )
            arguments |= {
                "supervision": cfg.INPUT.SUPERVISION,
                "ignore_label": next(iter(labels), UNANNOTATED),
                "augmentation": TrainingAugmentation(cfg),
            }
        return arguments

    def __call__(self, dataset_dict: dict, rng: np.random.Generator | None = None) -> dict:
        """
        Args:
            dataset_dict: a record as ``load_records`` returns it; left as it is.
            rng: source of the augmentation's random numbers. By default one seeded by numpy's global state, which
                Detectron2's own loaders seed in each worker.

        Raises:
            BLPSegError: a file is missing or damaged, sizes differ, or a label value is out of range.
        """
        record = dict(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        if not self.is_train:
            record["image"] = torch.from_numpy(np.stack(cv2.split(image)))
            return record
        label, present = self._read_label(record, image.shape[:2])
        if rng is None:
            rng = np.random.default_rng(np.random.randint(2**31))
        image, label = self.augmentation(image, label, rng)
        record["image"] = torch.from_numpy(image)
        record["scribble"] = torch.from_numpy(label.astype(np.int64))
        record["image_classes"] = torch.from_numpy(present)
        return record

    def _read_label(self, record: dict, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The label with C for "not annotated", (H, W) uint8, and the classes in it, (C,) bool."""
        path = record.get(LABEL_FILES[self.supervision])
        if path is None:
            raise BLPSegError(
                f"{record['file_name']}: its record has no {LABEL_FILES[self.supervision]}, which "
                f"INPUT.SUPERVISION {self.supervision!r} needs"
            )
        label = read_label_of(record["file_name"], path, size)
        # Few pixels of a scribble are labelled: counting those alone is faster.
        counts = np.bincount(label[label != UNANNOTATED], minlength=256) * self._labelled
        bad = np.flatnonzero(counts[self.num_classes :])
        if bad.size:
            value = self.num_classes + int(bad[0])
            raise BLPSegError(
                f"{path}: label value {value} is out of range: classes are 0..{self.num_classes - 1}, not annotated is "
                f"{UNANNOTATED}; mend the label or MODEL.SEM_SEG_HEAD.NUM_CLASSES, or set DATASETS.FOLDER.IGNORE_LABEL "
                f"{value} where masks mean 'no class' by it (tools/check_dataset.py finds all)"
            )
        present = counts[: self.num_classes] > 0
        present[0] = True
        return cv2.LUT(label, self._table), present
