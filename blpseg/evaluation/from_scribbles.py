"""How good a model is, known from strokes that it was not trained on, without a dense mask."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..utils.errors import BLPSegError
from ..utils.files import image_size, read_label_of
from ..utils.geometry import boundary_distance
from ..utils.labels import UNANNOTATED
from .inference import class_map
from .report import class_ious

logger = logging.getLogger(__name__)

# Strata of the probability of being annotated: pixels from the boundary of the predicted segment, and log-odds that the
# annotation head gives.
DISTANCES = (2, 3, 5, 8, 12, 18, 27, 40, 64, 100)
LOG_ODDS = (0, 2, 4)  # few: in finer strata the head's doubt about the class counts, and people do not know it
STRATA = (len(DISTANCES) + 1) * (len(LOG_ODDS) + 1)
PRIOR_PIXELS = 20  # a stratum of so many pixels has half its probability from all strata together
LARGEST_WEIGHT = 50.0  # of a pixel, in units of the mean
# An image of so many annotated pixels counts half by its own errors, half by those of all images. Its own alone make
# too little of the places where nobody draws, all images alone too much of small objects, which are drawn over densely
# (on VOC photographs and CamVid; docs/RESULTS.md).
SHARED_PIXELS = 300
RESAMPLES = 200
FEWEST_IMAGES = 5  # to resample: the interval of fewer is far too narrow


class Counts(NamedTuple):
    """What is counted in an image.

    Attributes:
        areas: (C,) int64 pixels of each predicted class.
        there: (STRATA,) int64 pixels of each stratum.
        cells: (K, 3) int64, prediction, label and stratum of annotated pixels, each combination once.
        pixels: (K,) int64, how many there are of each combination.
    """

    areas: np.ndarray
    there: np.ndarray
    cells: np.ndarray
    pixels: np.ndarray


def strata(prediction: np.ndarray, annotated: np.ndarray | None) -> np.ndarray:
    """The stratum of each pixel, 0 to ``STRATA - 1``: (H, W) class map and probability of being annotated (None:
    unknown) -> (H, W) int64."""
    distance = np.digitize(boundary_distance(prediction), DISTANCES)
    if annotated is None:
        return distance
    odds = np.clip(annotated, 1e-7, 1 - 1e-7)
    return np.digitize(np.log(odds / (1 - odds)), LOG_ODDS) * (len(DISTANCES) + 1) + distance


class ConfusionEstimate:
    """The confusion of all pixels, from those that annotators labelled.

    Each annotated pixel has the weight w = 1 / P(annotated), where P is the annotated share of its stratum (Horvitz &
    Thompson 1952) and w is clipped. So an image i, and all images together, have a distribution of labels for each
    prediction k. The estimate adds up, over images,

        A_ik (a_i F_ik + (1 - a_i) F_k),    a_i = n_i / (n_i + SHARED_PIXELS (1 - n_i / N_i))

    with A_ik the pixels of image i that are predicted as k, F_ik and F_k the weighted distributions, and n_i of the
    image's N_i pixels annotated. A prediction without an annotated pixel in an image has F_k there; one without any in
    all images has the distribution of all labels, which says nothing for it.
    """

    def __init__(self, images: Sequence[Counts]):
        self._areas = np.stack([image.areas for image in images])  # (images, C)
        self._there = np.stack([image.there for image in images])
        count, classes = self._areas.shape
        # Of each combination: its image, its stratum, its places in (C, C) and in (images, C).
        self._of = np.repeat(np.arange(count), [len(image.pixels) for image in images])
        prediction, label, self._stratum = np.concatenate([image.cells for image in images]).T
        self._cell, self._row = prediction * classes + label, self._of * classes + prediction
        self._pixels = np.concatenate([image.pixels for image in images]).astype(float)
        taken = np.bincount(self._of, self._pixels, minlength=count)
        self._own = taken / (taken + SHARED_PIXELS * (1 - taken / self._there.sum(axis=1)))

    def __call__(self, times: np.ndarray) -> np.ndarray:
        """(images,) how often each image counts -> (C, C) float64 pixels, [prediction, label]."""
        count, classes = self._areas.shape
        counted = times[self._of] * self._pixels
        taken, there = np.bincount(self._stratum, counted, minlength=STRATA), times @ self._there
        mean = taken.sum() / there.sum()
        probability = (taken + PRIOR_PIXELS * mean) / (there + PRIOR_PIXELS)
        weight = (1 / np.maximum(probability, mean / LARGEST_WEIGHT))[self._stratum]
        shared = np.bincount(self._cell, counted * weight, minlength=classes**2).reshape(classes, classes)
        found = shared.sum(axis=1, keepdims=True)
        shared = np.where(found > 0, shared / np.maximum(found, np.finfo(float).tiny), shared.sum(axis=0) / found.sum())
        mass = np.bincount(self._row, self._pixels * weight, minlength=count * classes)
        # What image i has of row k by itself; the rest of its A_ik follows F_k.
        own = times[:, None] * self._own[:, None] * self._areas * (mass > 0).reshape(count, classes)
        parts = own.ravel()[self._row] * self._pixels * weight / mass[self._row]
        by_itself = np.bincount(self._cell, parts, minlength=classes**2)
        rest = times @ self._areas - own.sum(axis=0)
        return by_itself.reshape(classes, classes) + rest[:, None] * shared


class ScribbleEvaluator(DatasetEvaluator):
    """An estimate of the mIoU from the strokes of images, with an interval.

    Plain accuracy on annotated pixels flatters: people scribble in the middle of things, where a model is right. Here
    each annotated pixel stands for those that are as seldom annotated, see :class:`ConfusionEstimate`. What says how
    seldom is BLPSeg's annotation head and the distance to the boundary of the predicted segment, calibrated on the
    images themselves: which of their pixels are annotated is known. The estimate is biased where, at equal strata,
    people avoid what the model gets wrong; a class without a stroke is left out.

    The interval is the 2.5th to 97.5th percentile over resampled images (bootstrap, seed 0); NaN for fewer than
    ``FEWEST_IMAGES``.
    """

    def __init__(self, dataset_name: str):
        """
        Args:
            dataset_name: in the catalogs, with ``scribble_file_name`` in its records.
        """
        self._name = dataset_name
        self._classes = MetadataCatalog.get(dataset_name).stuff_classes
        self._scribbles = {r["file_name"]: r["scribble_file_name"] for r in DatasetCatalog.get(dataset_name)}
        self.reset()

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str, output_dir: str | None) -> ScribbleEvaluator:
        return cls(dataset_name)

    def reset(self) -> None:
        self._images: dict[str, Counts] = {}

    def check_labels(self) -> None:
        """Read every label as :meth:`process` will.

        Raises:
            BLPSegError: see there and :meth:`evaluate`.
        """
        if not any([(self._read(image, image_size(image)) != UNANNOTATED).any() for image in self._scribbles]):
            raise self._no_stroke()

    def _no_stroke(self) -> BLPSegError:
        return BLPSegError(f"data set {self._name}: no annotated pixel to evaluate on; scribble on some of its images")

    def _read(self, image: str, size: tuple[int, int]) -> np.ndarray:
        path = self._scribbles[image]
        label = read_label_of(image, path, size)
        bad = label[(label >= len(self._classes)) & (label != UNANNOTATED)]
        if bad.size:
            raise BLPSegError(
                f"{path}: label value {bad[0]} is out of range: classes of {self._name} are "
                f"0..{len(self._classes) - 1}, not annotated is {UNANNOTATED}; mend the label"
            )
        return label

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: dicts with ``file_name``.
            outputs: dicts with ``sem_seg``, (C, H, W) logits or an (H, W) class map, and ``annotated`` if the model
                has it: (H, W) probability of being annotated.

        Raises:
            BLPSegError: the label is not of the image's size or has values beyond the classes.
        """
        for x, output in zip(inputs, outputs, strict=True):
            prediction = class_map(output["sem_seg"]).cpu().numpy()
            label = self._read(x["file_name"], prediction.shape)
            drawn = label != UNANNOTATED
            if not drawn.any():
                continue  # nobody worked on this image
            annotated = output["annotated"].cpu().numpy() if "annotated" in output else None
            stratum = strata(prediction, annotated)
            cells = np.stack([prediction[drawn], label[drawn], stratum[drawn]], axis=1).astype(np.int64)
            areas = np.bincount(prediction.ravel(), minlength=len(self._classes))
            there = np.bincount(stratum.ravel(), minlength=STRATA)
            self._images[x["file_name"]] = Counts(areas, there, *np.unique(cells, axis=0, return_counts=True))

    def evaluate(self) -> OrderedDict | None:
        """``{"scribbles": {"mIoU", "mIoU_low", "mIoU_high", "mIoU_annotated_pixels", "IoU-<class>", ...}}``, percent.

        ``mIoU_annotated_pixels`` is that of the annotated pixels, unweighted. None in the other processes.

        Raises:
            BLPSegError: no image has a stroke.
        """
        gathered = comm.gather(self._images)
        if not comm.is_main_process():
            return None
        images = {name: counts for part in gathered for name, counts in part.items()}
        if not images:
            raise self._no_stroke()
        ordered = [images[name] for name in sorted(images)]
        estimate, every = ConfusionEstimate(ordered), np.ones(len(ordered))
        ious = class_ious(estimate(every))
        plain = np.zeros((len(self._classes), len(self._classes)))
        for image in ordered:
            np.add.at(plain, (image.cells[:, 0], image.cells[:, 1]), image.pixels)
        low = high = np.nan
        if len(ordered) >= FEWEST_IMAGES:
            draws = np.random.default_rng(0).multinomial(len(ordered), every / len(ordered), size=RESAMPLES)
            means = [np.nanmean(class_ious(estimate(times))) for times in draws]
            low, high = np.percentile(means, (2.5, 97.5))
        result = OrderedDict(
            mIoU=np.nanmean(ious), mIoU_low=low, mIoU_high=high, mIoU_annotated_pixels=np.nanmean(class_ious(plain))
        )
        result |= {f"IoU-{name}": iou for name, iou in zip(self._classes, ious, strict=True)}
        missing = [name for name, iou in zip(self._classes, ious, strict=True) if np.isnan(iou)]
        if missing:
            logger.warning(f"{self._name}: no stroke of {', '.join(missing)}; the mIoU leaves them out")
        return OrderedDict(scribbles={key: float(100 * value) for key, value in result.items()})
