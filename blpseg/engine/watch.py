"""Pictures and numbers of the method on a few training images, always the same ones."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase

from ..data.dataset_mapper import ScribbleDatasetMapper
from ..data.datasets import load_records
from ..utils.files import read_label
from ..utils.labels import IGNORED
from ..visualization import result_panels


def pseudo_label_quality(
    pseudo_label: np.ndarray, scribble: np.ndarray, truth: np.ndarray | None, num_classes: int, ignore_label: int
) -> np.ndarray:
    """Counts behind coverage and precision of pseudo labels, so that those of several images can be added.

    Args:
        pseudo_label: (H, W); 255 = none.
        scribble: (H, W); 0..C-1 annotated, C = ``num_classes`` not annotated. Annotated pixels do not count.
        truth: (H, W) dense mask, with ``ignore_label`` where it has no class; or None.

    Returns:
        (4,) int64: pixels not annotated; of those, with a pseudo label; of those, with a true class; of those, right.
    """
    free = scribble == num_classes
    covered = free & (pseudo_label != IGNORED)
    judged = covered & (truth != ignore_label) & (truth != IGNORED) if truth is not None else np.zeros_like(covered)
    right = judged & (pseudo_label == truth) if truth is not None else judged
    return np.array([np.count_nonzero(x) for x in (free, covered, judged, right)], np.int64)


class WatchImages(HookBase):
    """Every ``OUTPUT.PANEL_PERIOD`` iterations, of ``OUTPUT.PANEL_IMAGES`` training images, whole and not augmented:

    * panels for TensorBoard: image, scribble, annotation probability, BLP weight, pseudo label, prediction, truth;
    * ``watch/pseudo_coverage`` and, where there are dense masks, ``watch/pseudo_precision``, in percent, of what
      would be pseudo labels now, also before self-training starts; ``watch/blp_weight``, the mean over annotated
      pixels.
    """

    def __init__(self, cfg: CfgNode):
        name = cfg.DATASETS.TRAIN[0]
        records = load_records(name, ("scribbles",) if cfg.INPUT.SUPERVISION == "dense" else ())
        count = min(cfg.OUTPUT.PANEL_IMAGES, len(records))
        self.records = [records[round((k + 0.5) * len(records) / count - 0.5)] for k in range(count)]
        self.period = cfg.OUTPUT.PANEL_PERIOD
        self.metadata = MetadataCatalog.get(name)
        self.num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.image_format = cfg.INPUT.FORMAT
        self.mapper = ScribbleDatasetMapper(cfg, is_train=True)
        self.mapper.augmentation = lambda image, label, rng: (np.ascontiguousarray(image.transpose(2, 0, 1)), label)

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.period and done != self.trainer.max_iter:
            return
        model, storage = self.trainer.model, self.trainer.storage
        counts, weights = np.zeros(4, np.int64), []
        model.eval()
        try:
            for k, record in enumerate(self.records):
                sample = self.mapper(record)
                maps = {name: value.cpu() for name, value in model.inspect([sample])[0].items()}
                scribble = sample["scribble"].numpy()
                truth = read_label(record["sem_seg_file_name"]) if "sem_seg_file_name" in record else None
                ignore = self.metadata.get("ignore_label", IGNORED)
                pseudo = maps["pseudo_label"].numpy()
                counts += pseudo_label_quality(pseudo, scribble, truth, self.num_classes, ignore)
                weights.append(maps["blp_weight"].numpy()[scribble < self.num_classes])
                storage.put_image(f"panels/{k}_{record['image_id']}", self._panel(sample, maps, truth))
        finally:
            model.train()
        free, covered, judged, right = counts.tolist()
        annotated = np.concatenate(weights)
        figures = {
            "pseudo_coverage": 100 * covered / free if free else None,
            "pseudo_precision": 100 * right / judged if judged else None,
            "blp_weight": float(annotated.mean()) if annotated.size else None,
        }
        for name, value in figures.items():
            if value is not None:
                storage.put_scalar(f"watch/{name}", value, smoothing_hint=False)

    def _panel(self, sample: dict, maps: dict[str, torch.Tensor], truth: np.ndarray | None) -> np.ndarray:
        """(3, H', W') uint8."""
        image = sample["image"].numpy().transpose(1, 2, 0).astype(np.uint8)
        if self.image_format == "BGR":
            image = np.ascontiguousarray(image[..., ::-1])
        classes = {"pseudo label": maps["pseudo_label"].numpy(), "prediction": maps["sem_seg"].argmax(dim=0).numpy()}
        picture = result_panels(
            image,
            self.metadata,
            scribble=sample["scribble"].numpy(),
            heat_maps={
                "annotation probability": 1 - maps["annotation_prob"][-1].numpy(),
                "BLP weight": maps["blp_weight"].numpy(),
            },
            maps=classes if truth is None else {**classes, "truth": truth},
            columns=4,
        )
        return picture.transpose(2, 0, 1)
