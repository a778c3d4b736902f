"""Where is a model wrong? IoU by distance to scribble and boundary and by thickness; pictures of the extremes.

Annotators scribble where a region is spacious (METHOD section 1). The places that they avoid hold few pixels, so mIoU
hardly shows how good a model is there. This report scores them separately.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data.datasets import load_records
from ..utils.files import read_image, read_label, read_label_of, write_csv, write_json, write_png_atomic
from ..utils.geometry import (
    DISTANCE_EDGES,
    THICKNESS_EDGES,
    boundary_distance,
    distance_bins,
    distance_to,
    local_thickness,
)
from ..utils.labels import IGNORED
from ..visualization import result_panels, write_figure
from .inference import class_map

if TYPE_CHECKING:  # matplotlib takes a while to load, and only reports draw figures
    from matplotlib.figure import Figure

RARE_SHARE = 0.25  # of the pixels: the quartile that is annotated least
ANNOTATION_IMAGES = 500  # training images, evenly spaced, that give the share of annotated pixels of each place
NUMBERS_UP_TO = 25  # classes whose confusion matrix is still readable with numbers in it


def _places(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) mask -> thickness bin and boundary distance bin of each pixel."""
    distance = boundary_distance(label)
    return local_thickness(distance), distance_bins(distance)


def class_ious(confusion: np.ndarray) -> np.ndarray:
    """(C, C) [prediction, label] -> (C,) IoU, 0..1, as :class:`SemSegEvaluator` counts; NaN for a class of no label."""
    hits, labelled = confusion.diagonal(), confusion.sum(axis=0)
    union = confusion.sum(axis=1) + labelled - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=labelled > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """(C, C) [prediction, label] -> mIoU in percent over the classes that are in the labels; NaN without any."""
    ious = class_ious(confusion)
    return float("nan") if np.isnan(ious).all() else float(100 * np.nanmean(ious))


def annotation_rate(pairs: Iterable[tuple[np.ndarray, np.ndarray]], num_classes: int) -> np.ndarray:
    """How often a pixel is annotated: (thickness bins, distance bins, C) float64.

    ``pairs`` are scribble and mask of images, (H, W) uint8 each, with 255 for not annotated and for ignored pixels.
    Where few pixels are counted the rate approaches that of the whole class.
    """
    shape = (len(THICKNESS_EDGES), len(DISTANCE_EDGES), num_classes)
    annotated, total = np.zeros((2, *shape))
    for scribble, mask in pairs:
        labelled = mask < num_classes
        drawn = labelled & (scribble != IGNORED)
        cell = np.ravel_multi_index((*_places(mask), np.where(labelled, mask, 0)), shape)
        total += np.bincount(cell[labelled], minlength=total.size).reshape(shape)
        annotated += np.bincount(cell[drawn], minlength=total.size).reshape(shape)
    rate = annotated.sum(axis=(0, 1)) / np.maximum(total.sum(axis=(0, 1)), 1)
    return (annotated + rate) / (total + 1)


def rare_confusion(confusion: np.ndarray, rate: np.ndarray, share: float = RARE_SHARE) -> np.ndarray:
    """Confusion (C, C) of each class's pixels in the places where that class is annotated least.

    Each class contributes the ``share`` of its pixels; otherwise the region would be the class that is scribbled least.
    Its bins are taken in the order of their ``rate``, (bins, C), until they hold that share, the last in part.
    ``confusion`` is (bins, C, C), [bin, prediction, label].
    """
    order = np.argsort(rate, axis=0, kind="stable")
    pixels = np.take_along_axis(confusion.sum(axis=1), order, axis=0)  # (bins, C)
    taken = np.clip(share * pixels.sum(axis=0) - (np.cumsum(pixels, axis=0) - pixels), 0, pixels)
    part = np.divide(taken, pixels, out=np.zeros(pixels.shape), where=pixels > 0)
    sorted_confusion = np.take_along_axis(confusion, order[:, None, :], axis=0)
    return (part[:, None, :] * sorted_confusion).sum(axis=0)


class ReportEvaluator(DatasetEvaluator):
    """Writes ``report/`` beside a data set's other results and returns ``{"report": {...}}``:

    * ``regions.csv``, ``regions.png``: mIoU, pixel accuracy and IoU by class, by distance to the nearest scribble (for
      records with ``scribble_file_name``; of any class), to the mask's boundary, and by local thickness.
    * ``rare_region_mIoU`` (in the results and in ``summary.json``): mIoU over the quarter of each class's pixels that
      lie where that class is annotated least. A place is a bin of local thickness and boundary distance; its
      annotation probability is the share of annotated pixels among the class's pixels in such places of the
      training images that have both scribble and mask (``places.csv``). Without such images the places are ranked by
      thickness x distance; ``summary.json`` says which. ``common_region_mIoU`` is the mIoU over the other pixels.
    * ``confusion.csv``, ``confusion.png``: rows are labels.
    * ``best_*.png``, ``worst_*.png``: the extremes by an image's own mIoU (over the classes in its mask).

    IoU by place counts only pixels of the place, as predictions and as labels; mIoU is over the classes labelled there.
    """

    def __init__(self, dataset_name: str, output_dir: str, *, training_names: Sequence[str] = (), panels: int = 10):
        """
        Args:
            dataset_name: in the catalogs.
            output_dir: ``report/`` is made in it.
            training_names: data sets to learn the annotation probability from.
            panels: how many best and worst images to draw.
        """
        self._metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._training_names = training_names
        self._folder = os.path.join(output_dir, "report")
        self._panels = panels
        self._classes = len(self._metadata.stuff_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str, output_dir: str) -> ReportEvaluator:
        return cls(dataset_name, output_dir, training_names=cfg.DATASETS.TRAIN, panels=cfg.TEST.REPORT.PANELS)

    def reset(self) -> None:
        c = self._classes
        self._by_place = np.zeros((len(THICKNESS_EDGES), len(DISTANCE_EDGES), c, c), np.int64)
        self._by_scribble = np.zeros((len(DISTANCE_EDGES), c, c), np.int64)
        self._extremes: list[tuple] = []  # (mIoU, record, prediction)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """As :meth:`SemSegEvaluator.process`, which must run first because it checks the labels."""
        for x, output in zip(inputs, outputs, strict=True):
            prediction = class_map(output["sem_seg"]).cpu().numpy()
            ignore = self._metadata.ignore_label
            label = read_label_of(x["file_name"], x["sem_seg_file_name"], prediction.shape, ignore)
            thickness, distance = _places(label)
            counts = self._count(thickness * np.uint8(len(DISTANCE_EDGES)) + distance, prediction, label)
            self._by_place += counts[: self._by_place.shape[0] * self._by_place.shape[1]].reshape(self._by_place.shape)
            if "scribble_file_name" in x:
                drawn = read_label_of(x["file_name"], x["scribble_file_name"], label.shape) != IGNORED
                if drawn.any():
                    away = distance_bins(distance_to(drawn))
                    self._by_scribble += self._count(away, prediction, label)[: len(DISTANCE_EDGES)]
            score = mean_iou(counts.sum(axis=0))
            if np.isfinite(score):
                record = {key: x[key] for key in ("file_name", "sem_seg_file_name", "scribble_file_name") if key in x}
                self._extremes = self._select([*self._extremes, (score, record, prediction)])

    def _count(self, bins: np.ndarray, prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
        """(places, C, C) pixels, [bin, prediction, label], ignored ones left out; 49 places or fewer."""
        c, places = self._classes, self._by_place.shape[0] * self._by_place.shape[1]
        labelled = label != IGNORED
        index = (bins[labelled].astype(np.int64) * c + prediction[labelled]) * c + label[labelled]
        return np.bincount(index, minlength=places * c * c).reshape(places, c, c)

    def _select(self, candidates: list[tuple]) -> list[tuple]:
        """The best and the worst, in ascending order."""
        ordered = sorted(candidates, key=lambda item: (item[0], item[1]["file_name"]))
        if len(ordered) <= 2 * self._panels:
            return ordered
        return ordered[: self._panels] + ordered[len(ordered) - self._panels :]

    def evaluate(self) -> dict | None:
        """``{"report": {"rare_region_mIoU", "common_region_mIoU"}}`` in percent; None in the other processes."""
        gathered = comm.gather((self._by_place, self._by_scribble, self._extremes))
        if not comm.is_main_process():
            return None
        by_place, by_scribble = (sum(part) for part in list(zip(*gathered, strict=True))[:2])
        extremes = self._select(list(itertools.chain(*(part[2] for part in gathered))))

        rate, source = self._annotation_rate()
        flat = by_place.reshape(-1, self._classes, self._classes)
        rare = rare_confusion(flat, rate.reshape(-1, self._classes))
        summary = {
            "rare_region_mIoU": mean_iou(rare),
            "common_region_mIoU": mean_iou(flat.sum(axis=0) - rare),
        }
        groups = [
            ("distance to boundary", DISTANCE_EDGES, by_place.sum(axis=0)),
            ("local thickness", THICKNESS_EDGES, by_place.sum(axis=1)),
        ]
        if by_scribble.any():
            groups.insert(0, ("distance to scribble", DISTANCE_EDGES, by_scribble))
        write_csv(f"{self._folder}/regions.csv", self._region_rows(groups))
        write_csv(f"{self._folder}/places.csv", self._place_rows(by_place, rate))
        write_figure(f"{self._folder}/regions.png", _draw_regions(groups, summary, self._dataset_name))
        confusion = flat.sum(axis=0).T
        names = list(self._metadata.stuff_classes)
        rows = [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
        write_csv(f"{self._folder}/confusion.csv", [["label \\ prediction", *names], *rows])
        write_figure(f"{self._folder}/confusion.png", _draw_confusion(confusion, names, self._dataset_name))
        self._draw_extremes(extremes)
        content = {**summary, "annotation_probability_from": source}
        write_json(f"{self._folder}/summary.json", content)
        return {"report": summary}

    def _annotation_rate(self) -> tuple[np.ndarray, str]:
        """(thickness bins, distance bins, C) probabilities or ranks, and where they come from."""
        pairs = []
        for name in self._training_names:
            ignore = MetadataCatalog.get(name).ignore_label
            pairs += [
                (r["scribble_file_name"], r["sem_seg_file_name"], r["file_name"], ignore)
                for r in load_records(name, optional=("scribbles", "masks"))
                if "scribble_file_name" in r and "sem_seg_file_name" in r
            ]
        if not pairs:
            rank = np.outer(np.arange(1, len(THICKNESS_EDGES) + 1), np.arange(1, len(DISTANCE_EDGES) + 1))
            rank = np.repeat(rank[..., None].astype(float), self._classes, axis=2)
            return rank, "rank of thickness x boundary distance (no training image has scribble and mask)"
        step = max(1, -(-len(pairs) // ANNOTATION_IMAGES))
        chosen = pairs[::step]
        rate = annotation_rate((_read_pair(*files) for files in chosen), self._classes)
        return rate, f"scribbles and masks of {len(chosen)} training images ({', '.join(self._training_names)})"

    def _region_rows(self, groups) -> list[list]:
        rows = [["group", "from_px", "to_px", "pixels", "share", "mIoU", "pACC", *self._metadata.stuff_classes]]
        for title, edges, confusion in groups:
            total = confusion.sum()
            for low, high, part in zip(edges, [*edges[1:], ""], confusion, strict=True):
                pixels = int(part.sum())
                iou = ["" if np.isnan(x) else f"{100 * x:.3f}" for x in class_ious(part)]
                scores = [f"{mean_iou(part):.3f}", f"{100 * part.trace() / pixels:.3f}"] if pixels else ["", ""]
                rows.append([title, low, high, pixels, f"{pixels / max(total, 1):.5f}", *scores, *iou])
        return rows

    def _place_rows(self, by_place: np.ndarray, rate: np.ndarray) -> list[list]:
        names = [f"annotation probability or rank of {name}" for name in self._metadata.stuff_classes]
        rows = [["thickness_from_px", "distance_from_px", "pixels", "mIoU", *names]]
        for (i, thickness), (j, distance) in itertools.product(enumerate(THICKNESS_EDGES), enumerate(DISTANCE_EDGES)):
            part = by_place[i, j]
            score = f"{mean_iou(part):.3f}" if part.any() else ""
            rows.append([thickness, distance, int(part.sum()), score, *(f"{value:.6f}" for value in rate[i, j])])
        return rows

    def _draw_extremes(self, extremes: list[tuple]) -> None:
        count = min(self._panels, len(extremes))
        for kind, chosen in (("worst", extremes[:count]), ("best", extremes[::-1][:count])):
            for place, (score, record, prediction) in enumerate(chosen, start=1):
                image = read_image(record["file_name"])
                ignore = self._metadata.ignore_label
                truth = read_label_of(record["file_name"], record["sem_seg_file_name"], prediction.shape, ignore)
                scribble = read_label(record["scribble_file_name"]) if "scribble_file_name" in record else None
                picture = result_panels(
                    image, self._metadata, scribble=scribble, maps={"prediction": prediction, "truth": truth}
                )
                name = f"{kind}_{place:02d}_{PurePath(record['file_name']).stem}_mIoU{score:.1f}.png"
                write_png_atomic(os.path.join(self._folder, name), picture)


def _read_pair(scribble_file: str, mask_file: str, image_file: str, ignore: int) -> tuple[np.ndarray, np.ndarray]:
    scribble = read_label(scribble_file)
    return scribble, read_label_of(image_file, mask_file, scribble.shape, ignore)


def _draw_regions(groups, summary: dict[str, float], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(groups), 4), dpi=100, layout="constrained")
    for axes, (name, edges, confusion) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        labels = [f"{a}-{b}" for a, b in zip(edges, edges[1:], strict=False)] + [f">{edges[-1]}"]
        share = confusion.sum(axis=(1, 2)) / max(confusion.sum(), 1)
        axes.bar(labels, 100 * share, color="#c9d4e3", label="share of the pixels")
        axes.plot(labels, [mean_iou(part) for part in confusion], "o-", color="#b3262a", label="mIoU")
        axes.set(ylim=(0, 104), xlabel=f"{name}, pixels", ylabel="percent")
        axes.legend(loc="upper left")
    figure.suptitle(
        f"{title}: mIoU {summary['rare_region_mIoU']:.2f} where annotations are rarest (a quarter of each class), "
        f"{summary['common_region_mIoU']:.2f} elsewhere"
    )
    return figure


def _draw_confusion(confusion: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """(C, C), [label, prediction] -> a picture of it in percent of each label."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    count = len(names)
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 0.4 * count + 2.5)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(share, cmap=colormaps["Blues"], vmin=0, vmax=100)
    axes.set_xticks(range(count), names, rotation=90)
    axes.set_yticks(range(count), names)
    axes.set(xlabel="prediction", ylabel="label", title=f"{title}: percent of each label")
    if count <= NUMBERS_UP_TO:
        for i, j in itertools.product(range(count), range(count)):
            if share[i, j] >= 0.5:
                color = "white" if share[i, j] > 60 else "black"
                axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(picture, shrink=0.8)
    return figure
