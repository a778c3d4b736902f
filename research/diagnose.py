#!/usr/bin/env python
"""What the parts of the method do in a trained model, on training images with scribbles and dense masks.

By distance to the mask's boundary: how many pixels are annotated, how many the annotation head believes to be, and p, q
and the BLP weight of annotated pixels. By class: its share of the true, annotated and pseudo-labelled pixels (as if
self-training were on). Of local aggregation: how its weights spread, and the mIoU of the logits before and after it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # research/ is not installed

import blpseg  # noqa: F401  (registers the data sets; before what loads torch, whose own deprecations it silences)

# isort: split
import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from tabulate import tabulate
from tqdm import tqdm

from blpseg import get_cfg
from blpseg.data.datasets import load_records
from blpseg.evaluation.inference import class_map
from blpseg.evaluation.predictor import load_model
from blpseg.evaluation.report import mean_iou
from blpseg.modeling.local_aggregation import aggregation_weights
from blpseg.modeling.outputs import upsample
from blpseg.utils.cli import add_debug_flag, count, run_command
from blpseg.utils.errors import BLPSegError
from blpseg.utils.files import check_writable, read_image, read_label_of, write_json
from blpseg.utils.geometry import DISTANCE_EDGES, boundary_distance, distance_bins
from blpseg.utils.labels import IGNORED


class Diagnosis:
    """Sums over images; :meth:`add` one, then read the tables. Of LAM, ``positions`` of each image are looked at."""

    def __init__(self, model, positions: int = 128):
        self.model, self.positions = model.eval(), positions
        self.random = torch.Generator().manual_seed(0)
        classes = model.num_classes
        # By distance: pixels, annotated, believed to be, and p, q, q of the class alone and BLP weight of the label.
        self.sums = np.zeros((7, len(DISTANCE_EDGES)))
        # Of each class: pixels in the mask, annotated, pseudo-labelled as it; its own with a pseudo label, a right one.
        self.classes = np.zeros((5, classes), np.int64)
        self.confusion = np.zeros((2, classes, classes), np.int64)  # without and with aggregation; [prediction, label]
        self.aggregation: list[np.ndarray] = []  # (5, positions) of each image

    @torch.no_grad()
    def add(self, image: np.ndarray, scribble: np.ndarray, mask: np.ndarray) -> None:
        """(H, W, 3) uint8 in the order of INPUT.FORMAT; (H, W) uint8, 255 = not annotated; likewise, 255 = ignored."""
        model, classes = self.model, self.model.num_classes
        inputs = {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "scribble": torch.from_numpy(np.where(scribble == IGNORED, classes, scribble).astype(np.int64)),
            "image_classes": torch.from_numpy(np.isin(np.arange(classes), scribble) | (np.arange(classes) == 0)),
        }
        found = {name: value.cpu().numpy() for name, value in model.inspect([inputs])[0].items()}
        bins = distance_bins(boundary_distance(mask))
        labelled = mask != IGNORED
        at = np.nonzero(labelled & (scribble != IGNORED))
        label, q = scribble[at].astype(np.int64), found["annotation_prob"]
        p = torch.from_numpy(found["sem_seg"]).softmax(dim=0).numpy()[(label, *at)]
        of_label = q[(label, *at)]
        alone = of_label / np.maximum(1 - q[(-1, *at)], 1e-12)
        for row, places, values in (
            (0, labelled, None), (1, at, None), (2, labelled, 1 - q[-1][labelled]),
            (3, at, p), (4, at, of_label), (5, at, alone), (6, at, found["blp_weight"][at]),
        ):  # fmt: skip
            self.sums[row] += np.bincount(bins[places], values, minlength=len(DISTANCE_EDGES))
        pseudo = found["pseudo_label"]
        trusted = labelled & (pseudo != IGNORED)
        right = trusted & (pseudo == mask)
        of_class = mask[labelled], scribble[at], pseudo[trusted], mask[trusted], mask[right]
        self.classes += [np.bincount(values, minlength=classes) for values in of_class]
        if model.local_aggregation is None:
            return
        padded = model.preprocess_image([inputs]).tensor
        outputs = model.outputs(padded, annotation=False)
        height, width = mask.shape
        for table, logits in zip(self.confusion, (outputs.raw_logits, outputs.logits), strict=True):
            prediction = class_map(upsample(logits, padded.shape[-2:])[0, :, :height, :width]).cpu().numpy()
            index = prediction[labelled].astype(np.int64) * classes + mask[labelled]
            table += np.bincount(index, minlength=classes**2).reshape(classes, classes)
        self._look_at_weights(outputs.embedding[0], mask)

    def _look_at_weights(self, features: torch.Tensor, mask: np.ndarray) -> None:
        height, width = features.shape[-2:]
        # The mask at the centres of the grid's cells; the grid of stride 4 covers the padded image.
        padded = np.full((4 * height, 4 * width), IGNORED)
        padded[: mask.shape[0], : mask.shape[1]] = mask
        label = torch.from_numpy(padded[2::4, 2::4].copy()).flatten()
        labelled = torch.nonzero(label != IGNORED)[:, 0]
        chosen = labelled[torch.randperm(len(labelled), generator=self.random)[: self.positions]]
        if not len(chosen):
            return
        lam, at = self.model.local_aggregation, chosen.to(features.device)
        weight = aggregation_weights(features, lam.sigma, at, lam.radius).cpu()
        near = aggregation_weights(torch.zeros_like(features[:1]), lam.sigma, at, lam.radius).cpu()
        same = (label[chosen, None] == label).double()
        place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
        distance = torch.cdist(place[chosen], place)
        own, number = weight.gather(1, chosen[:, None])[:, 0], 1 / weight.square().sum(dim=1)
        sums = [(a * b).sum(dim=1) for a, b in ((weight, distance), (weight, same), (near, same))]
        self.aggregation.append(torch.stack([value.double() for value in (own, number, *sums)]).numpy())

    def by_distance(self) -> list[dict[str, float]]:
        """A row for each distance bin, and one for all: shares in percent, means over the annotated pixels.

        "q, of the class alone" is q of the label among the classes, without "not annotated". It stays high where the
        annotation head knows the class and only doubts that people scribble there.
        """
        names = [f"{low}-{high}" for low, high in zip(DISTANCE_EDGES, [*DISTANCE_EDGES[1:], ""], strict=True)]
        keys, rows = ("p of label", "q of label", "q, of the class alone", "BLP weight"), []
        for name, values in zip([*names, "all"], [*self.sums.T, self.sums.sum(axis=1)], strict=True):
            if pixels := values[0]:
                means = values[3:] / (values[1] or float("nan"))
                row = {"distance to boundary, px": name, "share of pixels": 100 * pixels / self.sums[0].sum()}
                row |= {"annotated": 100 * values[1] / pixels, "believed to be": 100 * values[2] / pixels}
                rows.append(row | dict(zip(keys, means.tolist(), strict=True)))
        return rows

    def by_class(self, names: list[str]) -> list[dict[str, float]]:
        """A row for each class, in percent: its share of the pixels that have each kind of label, and how many of its
        pixels have a pseudo label, and a right one."""
        shares = 100 * self.classes[:3] / np.maximum(self.classes[:3].sum(axis=1, keepdims=True), 1)
        own = 100 * self.classes[3:] / np.maximum(self.classes[0], 1)
        keys = (
            "share of the mask",
            "of the scribbles",
            "of the pseudo labels",
            "its pixels with one",
            "with the right one",
        )
        columns = np.concatenate([shares, own]).T.tolist()
        return [{"class": name, **dict(zip(keys, row, strict=True))} for name, row in zip(names, columns, strict=True)]

    def of_aggregation(self) -> dict[str, float]:
        """Means, shares and quartiles over the positions looked at, as a mean can hide that some positions keep all
        weight and others average over many; mIoU of the images without and with aggregation. {} without LAM."""
        if not self.aggregation:
            return {}
        names = (
            "weight on the position itself", "effective number of positions", "mean distance, cells",
            "weight on the same class", "the same for the distance term alone",
        )  # fmt: skip
        values = np.concatenate(self.aggregation, axis=1)
        own, number = values[:2]
        result = dict(zip(names, values.mean(axis=1).tolist(), strict=True))
        result["positions with over 0.9 on themselves, %"] = 100 * float((own > 0.9).mean())
        result["positions with under 0.1 on themselves, %"] = 100 * float((own < 0.1).mean())
        for name, at in (("lower quartile", 0.25), ("median", 0.5), ("upper quartile", 0.75)):
            result[f"effective number, {name}"] = float(np.quantile(number, at))
        for when, table in zip(("before", "after"), self.confusion, strict=True):
            result[f"mIoU of the logits {when}"] = mean_iou(table)
        return result


def diagnose(model, records: list[dict], ignore_label: int, image_format: str, scale: float) -> Diagnosis:
    """:class:`Diagnosis` of records that have a scribble and a dense mask, read at ``scale``."""
    records = [r for r in records if "scribble_file_name" in r and "sem_seg_file_name" in r]
    if not records:
        raise BLPSegError("no image has both a scribble and a dense mask; name another data set")
    diagnosis = Diagnosis(model)
    for record in tqdm(records, desc="images", disable=None):
        image = read_image(record["file_name"], image_format)
        scribble, mask = (
            read_label_of(record["file_name"], record[key], image.shape[:2], ignore)
            for key, ignore in (("scribble_file_name", IGNORED), ("sem_seg_file_name", ignore_label))
        )
        for kind, label in (("scribble", scribble), ("sem_seg", mask)):
            if (unknown := label[(label != IGNORED) & (label >= model.num_classes)]).size:
                name = record[f"{kind}_file_name"]
                raise BLPSegError(f"{name}: label {unknown[0]}, but the model has {model.num_classes} classes")
        if scale != 1:
            size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
            image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
            scribble, mask = (cv2.resize(x, size, interpolation=cv2.INTER_NEAREST_EXACT) for x in (scribble, mask))
        diagnosis.add(image, scribble, mask)
    return diagnosis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config of the model")
    parser.add_argument("--dataset", metavar="NAME", help="default: the config's DATASETS.TRAIN")
    parser.add_argument("--limit", type=count, default=40, metavar="N", help="images, evenly spaced (default: 40)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON too")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config keys")
    args = add_debug_flag(parser).parse_args()
    cfg = get_cfg(args.config_file, args.opts)
    if not (args.dataset or cfg.DATASETS.TRAIN):
        raise BLPSegError("config: DATASETS.TRAIN is empty; name a data set with --dataset")
    name = args.dataset or cfg.DATASETS.TRAIN[0]
    records, metadata, model = load_records(name), MetadataCatalog.get(name), load_model(cfg)
    records = records[:: max(1, -(-len(records) // args.limit))]
    if len(metadata.stuff_classes) != model.num_classes:
        raise BLPSegError(f"{name} has {len(metadata.stuff_classes)} classes, the model {model.num_classes}")
    if args.output:
        check_writable(args.output)
    scale = sum(cfg.INPUT.SCALE_RANGE) / 2
    found = diagnose(model, records, metadata.get("ignore_label", 255), cfg.INPUT.FORMAT, scale)
    tables = found.by_distance(), found.by_class(list(metadata.stuff_classes)), found.of_aggregation()
    print(f"{name}: {len(records)} images at {scale:g} of their size")
    print(tabulate(tables[0], headers="keys", floatfmt=".3f"), tabulate(tables[1], headers="keys", floatfmt=".2f"),
          tabulate(tables[2].items(), floatfmt=".3f", tablefmt="plain"), sep="\n\n")  # fmt: skip
    if args.output:
        content = {"weights": cfg.MODEL.WEIGHTS, "data": name, "images": len(records), "scale": scale}
        content |= dict(zip(("by distance", "by class", "aggregation"), tables, strict=True))
        write_json(args.output, content)


if __name__ == "__main__":
    run_command(main)
