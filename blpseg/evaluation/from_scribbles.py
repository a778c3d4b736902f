"""How good a model is, known from strokes that it was not trained on, without a dense mask."""

from __future__ import annotations

import logging
from collections import OrderedDict

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from scipy.sparse import csr_matrix

from ..utils.errors import BLPSegError
from ..utils.files import image_size, read_label
from ..utils.geometry import boundary_distance
from ..utils.labels import UNANNOTATED
from .inference import class_map

logger = logging.getLogger(__name__)

# Strata of the probability of being annotated: pixels from the boundary of the predicted segment, and log-odds that the
# annotation head gives.
DISTANCES = (2, 3, 5, 8, 12, 18, 27, 40, 64, 100)
LOG_ODDS = (0, 2, 4)  # few: in finer strata the head's doubt about the class counts, and people do not know it
STRATA = (len(DISTANCES) + 1) * (len(LOG_ODDS) + 1)
PRIOR_PIXELS = 20  # a stratum of so many pixels has half its probability from all strata together
LARGEST_WEIGHT = 50.0  # of a pixel, in units of the mean
RESAMPLES = 200


def strata(prediction: np.ndarray, annotated: np.ndarray | None) -> np.ndarray:
    """The stratum of each pixel, 0 to ``STRATA - 1``: (H, W) class map and probability of being annotated (None:
    unknown) -> (H, W) int64."""
    distance = np.digitize(boundary_distance(prediction), DISTANCES)
    if annotated is None:
        return distance
    odds = np.clip(annotated, 1e-7, 1 - 1e-7)
    return np.digitize(np.log(odds / (1 - odds)), LOG_ODDS) * (len(DISTANCES) + 1) + distance


def estimate_confusion(pixels: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """The confusion of all pixels, from those that annotators labelled.

    Each annotated pixel is weighted by the inverse of its probability of being annotated, which is the annotated share
    of its stratum (Horvitz & Thompson 1952); the weights are clipped. Each row is then scaled to the pixels of that
    prediction, whose number is known.

    Args:
        pixels: (C, STRATA) all pixels by prediction and stratum.
        annotated: (C, C, STRATA) annotated pixels by prediction, label and stratum.

    Returns:
        (C, C) float64 pixels, [prediction, label]. A prediction without an annotated pixel has an empty row.
    """
    taken, there = annotated.sum(axis=(0, 1)), pixels.sum(axis=0)
    mean = taken.sum() / max(there.sum(), 1)
    probability = (taken + PRIOR_PIXELS * mean) / (there + PRIOR_PIXELS)
    weight = 1 / np.maximum(probability, mean / LARGEST_WEIGHT) if mean else np.zeros_like(probability)
    confusion = annotated @ weight
    rows = confusion.sum(axis=1, keepdims=True)
    scale = pixels.sum(axis=1, keepdims=True) / np.where(rows > 0, rows, 1)
    return confusion * scale


def _ious(confusion: np.ndarray) -> np.ndarray:
    """(C,) IoU of [prediction, label], NaN for a class that no label has: as :class:`SemSegEvaluator` counts."""
    hits = np.diag(confusion)
    labelled = confusion.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(labelled > 0, hits / (labelled + confusion.sum(axis=1) - hits), np.nan)


class ScribbleEvaluator(DatasetEvaluator):
    """An estimate of the mIoU from the strokes of images, with an interval.

    Plain accuracy on annotated pixels flatters: people scribble in the middle of things, where a model is right. Here
    each annotated pixel stands for those that are as seldom annotated, see :func:`estimate_confusion`. What says how
    seldom is BLPSeg's annotation head and the distance to the boundary of the predicted segment, calibrated on the
    images themselves: which of their pixels are annotated is known. The estimate is biased where, at equal strata,
    people avoid what the model gets wrong; a class without a stroke is left out.

    The interval is the 2.5th to 97.5th percentile over resampled images (bootstrap, seed 0).
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
        # An image's (cells, counts) of all and of annotated pixels; a cell is its place in the arrays of
        # estimate_confusion.
        self._images: dict[str, tuple[tuple, tuple]] = {}

    def check_labels(self) -> None:
        """Read every label as :meth:`process` will.

        Raises:
            BLPSegError: see there.
        """
        for image in self._scribbles:
            self._read(image, image_size(image))

    def _read(self, image: str, size: tuple[int, int]) -> np.ndarray:
        path = self._scribbles[image]
        label = read_label(path)
        if label.shape != tuple(size):
            raise BLPSegError(
                f"{path}: the label is {label.shape[1]} x {label.shape[0]} pixels, the image {image} "
                f"{size[1]} x {size[0]}; they must agree"
            )
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
        classes = len(self._classes)
        for x, output in zip(inputs, outputs, strict=True):
            prediction = class_map(output["sem_seg"]).cpu().numpy()
            label = self._read(x["file_name"], prediction.shape)
            drawn = label != UNANNOTATED
            if not drawn.any():
                continue  # nobody worked on this image
            annotated = output["annotated"].cpu().numpy() if "annotated" in output else None
            stratum = strata(prediction, annotated)
            prediction = prediction.astype(np.int64)
            cells = prediction * STRATA + stratum
            labelled = (prediction[drawn] * classes + label[drawn]) * STRATA + stratum[drawn]
            self._images[x["file_name"]] = tuple(np.unique(c, return_counts=True) for c in (cells, labelled))

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
            raise BLPSegError(f"data set {self._name}: no annotated pixel to evaluate on")
        ordered = [images[name] for name in sorted(images)]
        classes = len(self._classes)
        pixels = _Counts([counts for counts, _ in ordered], (classes, STRATA))
        annotated = _Counts([counts for _, counts in ordered], (classes, classes, STRATA))
        every = np.ones(len(ordered))
        ious = _ious(estimate_confusion(pixels.total(every), annotated.total(every)))
        plain = _ious(annotated.total(every).sum(axis=2))
        rng = np.random.default_rng(0)
        draws = rng.multinomial(len(ordered), every / len(ordered), size=RESAMPLES)
        means = [np.nanmean(_ious(estimate_confusion(pixels.total(n), annotated.total(n)))) for n in draws]
        low, high = np.percentile(means, (2.5, 97.5))
        result = OrderedDict(
            mIoU=np.nanmean(ious), mIoU_low=low, mIoU_high=high, mIoU_annotated_pixels=np.nanmean(plain)
        )
        result |= {f"IoU-{name}": iou for name, iou in zip(self._classes, ious, strict=True)}
        missing = [name for name, iou in zip(self._classes, ious, strict=True) if np.isnan(iou)]
        if missing:
            logger.warning(f"{self._name}: no stroke of {', '.join(missing)}; the mIoU leaves them out")
        return OrderedDict(scribbles={key: float(100 * value) for key, value in result.items()})


class _Counts:
    """Counts of images in the cells of an array, of which few are used."""

    def __init__(self, images: list[tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...]):
        self._shape = shape
        self._cells, columns = np.unique(np.concatenate([cells for cells, _ in images]), return_inverse=True)
        starts = np.cumsum([0, *(len(cells) for cells, _ in images)])
        counts = np.concatenate([n for _, n in images]).astype(float)
        self._table = csr_matrix((counts, columns, starts), shape=(len(images), len(self._cells)))

    def total(self, times: np.ndarray) -> np.ndarray:
        """The sum over images, each taken so many times: float64 of the array's shape."""
        total = np.zeros(self._shape)
        total.reshape(-1)[self._cells] = times @ self._table
        return total
