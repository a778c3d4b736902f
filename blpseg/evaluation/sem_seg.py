"""Detectron2's semantic segmentation evaluator, made fast and strict about labels."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from pathlib import PurePath

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator

from ..utils.errors import BLPSegError
from ..utils.files import image_size, read_label_of, write_png_atomic
from ..utils.labels import IGNORED
from .inference import class_map


def prediction_folder(dataset_name: str) -> str:
    """Where PASCAL's evaluation server expects class maps, below the folder that is uploaded.

    ``voc_2012_val`` -> ``results/VOC2012/Segmentation/comp6_val_cls``; other data sets stand under their own name.
    """
    name, _, split = dataset_name.rpartition("_")
    if not name:
        name, split = dataset_name, "test"
    return os.path.join("results", "VOC2012" if name == "voc_2012" else name, "Segmentation", f"comp6_{split}_cls")


class SemSegEvaluator(Detectron2SemSegEvaluator):
    """mIoU, fwIoU, mACC, pACC and IoU and accuracy of each class, in percent.

    The definitions are Detectron2's: confusion summed over the whole set (and over processes), pixels with
    the ignore label left out, classes that no mask of the set contains left out of the means.
    Ours differs from :class:`detectron2.evaluation.SemSegEvaluator` in that the boundary IoU and the run
    lengths of every segment, which cost several forwards of a small model, are off unless asked for; that
    labels outside the classes are an error; and that class maps can be written as PNG.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        write_predictions: bool = False,
        palette: bool = False,
        boundary_iou: bool = False,
        coco_json: bool = False,
    ):
        """
        Args:
            dataset_name: in the catalogs; its metadata has ``stuff_classes``, ``stuff_colors``, ``ignore_label``.
            output_dir: where results are written; needed for PNG and JSON.
            write_predictions: write class numbers to ``<output_dir>/<prediction_folder>/NAME.png``, grey.
            palette: store the class colours in them; OpenCV then reads colours, PIL still numbers.
            coco_json: write Detectron2's ``sem_seg_predictions.json`` and ``sem_seg_evaluation.pth``.
            boundary_iou: add Detectron2's BoundaryIoU.

        Raises:
            BLPSegError: images without a mask, or several of one name whose PNG would overwrite each other.
        """
        records = DatasetCatalog.get(dataset_name)
        if len(MetadataCatalog.get(dataset_name).stuff_classes) > IGNORED:
            raise BLPSegError(f"data set {dataset_name}: more than {IGNORED} classes do not fit 8-bit masks")
        for record in records:
            if "sem_seg_file_name" not in record:
                raise BLPSegError(
                    f"{record['file_name']}: data set {dataset_name} has no mask for it; evaluation needs masks"
                )
        super().__init__(dataset_name, distributed=True, output_dir=output_dir if coco_json else None)
        self._logger = logging.getLogger(__name__)
        self._logger.setLevel(logging.WARNING)  # the base class logs one dict of every number; we print a table
        self._compute_boundary_iou = self._compute_boundary_iou and boundary_iou
        self._coco_json = coco_json
        self._palette = MetadataCatalog.get(dataset_name).get("stuff_colors") if palette else None
        self._prediction_dir = None
        if write_predictions:
            names = [PurePath(record["file_name"]).stem for record in records]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise BLPSegError(f"data set {dataset_name}: several images named {twice}; their PNG would collide")
            self._prediction_dir = os.path.join(output_dir, prediction_folder(dataset_name))

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str, output_dir: str | None) -> SemSegEvaluator:
        return cls(
            dataset_name,
            output_dir,
            write_predictions=cfg.TEST.WRITE_PREDICTIONS,
            palette=cfg.TEST.PALETTE,
            boundary_iou=cfg.TEST.BOUNDARY_IOU,
            coco_json=cfg.TEST.COCO_JSON,
        )

    @property
    def confusion(self) -> np.ndarray:
        """(C, C) int64 pixels, [prediction, label]; of the whole set on the main process after :meth:`evaluate`."""
        return self._conf_matrix[:-1, :-1]

    def check_labels(self) -> None:
        """Read every mask as :meth:`process` will.

        Raises:
            BLPSegError: see there.
        """
        for image_file, mask_file in self.input_file_to_gt_file.items():
            label = read_label_of(image_file, mask_file, image_size(image_file), self._ignore_label)
            found = np.bincount(label.ravel(), minlength=IGNORED + 1)
            self._refuse_values(found[self._num_classes : IGNORED], mask_file, image_file)

    def _refuse_values(self, counts: np.ndarray, mask_file: str, image_file: str) -> None:
        """``counts``: (254 - C,) pixels of the mask with the values from C on."""
        if counts.any():
            bad = self._num_classes + int(np.flatnonzero(counts)[0])
            raise BLPSegError(
                f"{mask_file}: label {bad} (mask of {image_file}) is neither a class 0..{self._num_classes - 1} of "
                f"{self._dataset_name} nor its ignore label {self._ignore_label}; mend the mask, or where it means 'no "
                f"class' set DATASETS.FOLDER.IGNORE_LABEL {bad} (its ignore_label, for a data set of its own)"
            )

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: dicts with ``file_name``, as the test loader gives them.
            outputs: dicts with ``sem_seg``, (C, H, W) logits or an (H, W) class map.

        Raises:
            BLPSegError: see :func:`.read_label_of`; or a label is neither a class nor the ignore label.
        """
        for x, output in zip(inputs, outputs, strict=True):
            prediction = class_map(output["sem_seg"]).cpu().numpy()
            mask_file = self.input_file_to_gt_file[x["file_name"]]
            label = read_label_of(x["file_name"], mask_file, prediction.shape, self._ignore_label)
            self._conf_matrix += self._count(prediction, label, mask_file, x["file_name"])
            self._process_pixels(x, prediction, label)

    def _process_pixels(self, x: dict, prediction: np.ndarray, label: np.ndarray) -> None:
        """Further results of an image's (H, W) class map and checked label; subclasses add theirs."""
        if self._prediction_dir:
            path = os.path.join(self._prediction_dir, PurePath(x["file_name"]).stem + ".png")
            write_png_atomic(path, prediction, palette=self._palette)
        if self._compute_boundary_iou:
            label = np.where(label == IGNORED, np.uint8(self._num_classes), label)
            pair = (self._num_classes + 1) * self._mask_to_boundary(prediction).astype(np.int64)
            pair += self._mask_to_boundary(label)
            counts = np.bincount(pair.ravel(), minlength=self._b_conf_matrix.size)
            self._b_conf_matrix += counts.reshape(self._b_conf_matrix.shape)
        if self._coco_json:
            self._predictions.extend(self.encode_json_sem_seg(prediction, x["file_name"]))

    def _count(self, prediction: np.ndarray, label: np.ndarray, mask_file: str, image_file: str) -> np.ndarray:
        """(C + 1, C + 1) pixels, [prediction, label]; index C is "no class", for labels the ignored pixels."""
        classes, values = self._num_classes, IGNORED + 1  # a mask is uint8
        pair = np.left_shift(prediction, 8, dtype=np.int64)
        pair |= label
        by_value = np.bincount(pair.ravel(), minlength=classes * values).reshape(-1, values)
        if len(by_value) > classes:
            raise BLPSegError(
                f"{image_file}: predicted class {len(by_value) - 1}, but data set {self._dataset_name} has "
                f"{classes} classes; MODEL.SEM_SEG_HEAD.NUM_CLASSES must be {classes}"
            )
        self._refuse_values(by_value[:, classes:IGNORED].sum(axis=0), mask_file, image_file)
        counts = np.zeros_like(self._conf_matrix)
        counts[:classes, :classes] = by_value[:, :classes]
        counts[:classes, classes] = by_value[:, IGNORED]
        return counts

    def evaluate(self) -> OrderedDict | None:
        """``{"sem_seg": {"mIoU", "fwIoU", "IoU-<class>", ..., "mACC", "pACC", "ACC-<class>", ...}}``, percent;
        None in the other processes. A class that no mask contains has NaN.

        Raises:
            BLPSegError: no mask has a labelled pixel.
        """
        with np.errstate(invalid="ignore"):
            results = super().evaluate()
        if results is not None and not self.confusion.any():
            raise BLPSegError(f"data set {self._dataset_name}: no labelled pixel to evaluate on")
        return results
