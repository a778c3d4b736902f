"""What the parts of the method do in a trained model: weights of the BLP loss, what the annotation head has learned of
the label preference, and whom local aggregation listens to."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from tqdm import tqdm

from blpseg.evaluation.inference import class_map
from blpseg.evaluation.report import mean_iou
from blpseg.evaluation.sem_seg import read_ground_truth
from blpseg.modeling import BLPSeg
from blpseg.modeling.local_aggregation import aggregation_weights
from blpseg.modeling.outputs import upsample
from blpseg.utils.errors import BLPSegError
from blpseg.utils.files import read_image, read_label
from blpseg.utils.geometry import DISTANCE_EDGES, boundary_distance, distance_bins
from blpseg.utils.labels import IGNORED

__all__ = ["Diagnosis"]


class Diagnosis:
    """Sums over training images that have scribbles and dense masks; :meth:`add` one, then read the tables."""

    def __init__(self, model: BLPSeg, *, positions: int = 128, seed: int = 0):
        """
        Args:
            model: trained; put into evaluation mode.
            positions: of the grid whose aggregation weights are looked at, an image, drawn at random.
            seed: of the draw.
        """
        self.model = model.eval()
        self.positions = positions
        self.random = torch.Generator().manual_seed(seed)
        bins, classes = len(DISTANCE_EDGES), model.num_classes
        self.pixels, self.annotated, self.predicted = np.zeros((3, bins))
        self.p, self.q, self.class_q, self.weight = np.zeros((4, bins))
        # Of each class: pixels in the mask, annotated, pseudo-labelled as it; its own with a pseudo label, a right one.
        self.classes = np.zeros((5, classes), np.int64)
        self.confusion = np.zeros((2, classes, classes), np.int64)  # without and with aggregation; [prediction, label]
        self.aggregation: list[np.ndarray] = []  # (5, positions) of each image

    @torch.no_grad()
    def add(self, image: np.ndarray, scribble: np.ndarray, mask: np.ndarray) -> None:
        """
        Args:
            image: (H, W, 3) uint8 in the order of INPUT.FORMAT.
            scribble: (H, W) uint8, 255 = not annotated.
            mask: (H, W) uint8, 255 = ignored.
        """
        model, classes = self.model, self.model.num_classes
        inputs = {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "scribble": torch.from_numpy(np.where(scribble == IGNORED, classes, scribble).astype(np.int64)),
            "image_classes": torch.from_numpy(np.isin(np.arange(classes), scribble) | (np.arange(classes) == 0)),
        }
        (found,) = model.inspect([inputs])
        bins = distance_bins(boundary_distance(mask))
        labelled = mask != IGNORED
        self.pixels += self._sum(bins[labelled])
        drawn = labelled & (scribble != IGNORED)
        self.annotated += self._sum(bins[drawn])
        q = found["annotation_prob"].cpu().numpy()
        self.predicted += self._sum(bins[labelled], 1 - q[-1][labelled])
        at = np.nonzero(drawn)
        label = scribble[at].astype(np.int64)
        p = found["sem_seg"].softmax(dim=0).cpu().numpy()
        self.p += self._sum(bins[at], p[(label, *at)])
        self.q += self._sum(bins[at], q[(label, *at)])
        self.class_q += self._sum(bins[at], q[(label, *at)] / np.maximum(1 - q[(-1, *at)], 1e-12))
        self.weight += self._sum(bins[at], found["blp_weight"].cpu().numpy()[at])
        pseudo = found["pseudo_label"].cpu().numpy()
        trusted = labelled & (pseudo != IGNORED)
        right = trusted & (pseudo == mask)
        for counts, values in zip(
            self.classes, (mask[labelled], scribble[at], pseudo[trusted], mask[trusted], mask[right]), strict=True
        ):
            counts += np.bincount(values, minlength=classes)
        if model.local_aggregation is None:
            return
        padded = model.preprocess_image([inputs]).tensor
        outputs = model.outputs(padded, annotation=False)
        height, width = image.shape[:2]
        for table, logits in zip(self.confusion, (outputs.raw_logits, outputs.logits), strict=True):
            prediction = class_map(upsample(logits, padded.shape[-2:])[0, :, :height, :width]).cpu().numpy()
            index = prediction[labelled].astype(np.int64) * classes + mask[labelled]
            table += np.bincount(index, minlength=classes**2).reshape(classes, classes)
        self._look_at_weights(outputs.embedding[0], mask)

    def _sum(self, bins: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(bins, values, minlength=len(DISTANCE_EDGES))

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
        sigma, radius = lam.sigma, lam.radius
        weight = aggregation_weights(features, sigma, at, radius).cpu()
        near = aggregation_weights(torch.zeros_like(features[:1]), sigma, at, radius).cpu()
        same = (label[chosen, None] == label).double()
        place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
        distance = torch.cdist(place[chosen], place)
        found = (
            weight.gather(1, chosen[:, None])[:, 0],
            1 / weight.square().sum(dim=1),
            (weight * distance).sum(dim=1),
            (weight * same).sum(dim=1),
            (near * same).sum(dim=1),
        )
        self.aggregation.append(torch.stack([value.double() for value in found]).numpy())

    def by_distance(self) -> list[dict[str, float]]:
        """A row for each bin of the distance to the mask's boundary, and one of all: shares in percent.

        "of the class alone" is q of the label among the classes, 1 - q of "not annotated" taken out: what is left of a
        low q when the annotation head knows the class and only doubts that people scribble there.
        """
        sums = [self.pixels, self.annotated, self.predicted, self.p, self.q, self.class_q, self.weight]
        rows = []
        labels = [f"{low}-{high}" for low, high in zip(DISTANCE_EDGES, DISTANCE_EDGES[1:], strict=False)]
        for name, values in zip(
            [*labels, f">{DISTANCE_EDGES[-1]}", "all"], [*np.stack(sums, 1), [s.sum() for s in sums]], strict=True
        ):
            pixels, annotated, predicted, p, q, class_q, weight = values
            if not pixels:
                continue
            drawn = annotated or float("nan")
            rows.append(
                {
                    "distance to boundary, px": name,
                    "share of pixels": 100 * pixels / self.pixels.sum(),
                    "annotated": 100 * annotated / pixels,
                    "predicted to be": 100 * predicted / pixels,
                    "p of label": p / drawn,
                    "q of label": q / drawn,
                    "of the class alone": class_q / drawn,
                    "BLP weight": weight / drawn,
                }
            )
        return rows

    def by_class(self) -> list[dict[str, float]]:
        """A row for each class, in percent: its share of the pixels that have each kind of label, and how many of its
        pixels have a pseudo label, and a right one."""
        rows = []
        for label, counts in enumerate(self.classes.T):
            mask, annotated, pseudo = (
                100 * n / max(total, 1) for n, total in zip(counts[:3], self.classes[:3].sum(axis=1), strict=True)
            )
            own = max(counts[0], 1)
            rows.append(
                {
                    "class": label,
                    "share of the mask": mask,
                    "of the scribbles": annotated,
                    "of the pseudo labels": pseudo,
                    "its pixels with one": 100 * counts[3] / own,
                    "with the right one": 100 * counts[4] / own,
                }
            )
        return rows

    def of_aggregation(self) -> dict[str, float]:
        """Means over the positions looked at, how they differ, and mIoU of these images without and with aggregation.

        A mean can hide that some positions listen to themselves alone and others to many: hence the shares (percent)
        of either, and quartiles. {} without LAM.
        """
        if not self.aggregation:
            return {}
        names = (
            "weight on the position itself", "effective number of positions", "mean distance, cells",
            "weight on the same class", "the same for the distance term alone",
        )  # fmt: skip
        values = np.concatenate(self.aggregation, axis=1)
        means = dict(zip(names, values.mean(axis=1).tolist(), strict=True))
        own, number = values[:2]
        lower, median, upper = np.quantile(number, (0.25, 0.5, 0.75)).tolist()
        without, with_it = (mean_iou(table) for table in self.confusion)
        return means | {
            "positions with over 0.9 on themselves, %": 100 * float((own > 0.9).mean()),
            "positions with under 0.1 on themselves, %": 100 * float((own < 0.1).mean()),
            "effective number, lower quartile": lower,
            "effective number, median": median,
            "effective number, upper quartile": upper,
            "mIoU of the logits before": without,
            "mIoU of the logits after": with_it,
        }


def run(model: BLPSeg, records: Sequence[dict], ignore_label: int, image_format: str, scale: float) -> Diagnosis:
    """:class:`Diagnosis` of records with ``scribble_file_name`` and ``sem_seg_file_name``, read at ``scale``.

    Raises:
        BLPSegError: no record has both, a file is unsound, or its labels are not the model's.
    """
    records = [r for r in records if "scribble_file_name" in r and "sem_seg_file_name" in r]
    if not records:
        raise BLPSegError("no image has both a scribble and a dense mask; name another data set")
    diagnosis = Diagnosis(model)
    for record in tqdm(records, desc="images", disable=None):
        image, scribble = read_image(record["file_name"], image_format), read_label(record["scribble_file_name"])
        mask = read_ground_truth(record["sem_seg_file_name"], record["file_name"], image.shape[:2], ignore_label)
        if scribble.shape != mask.shape:
            raise BLPSegError(f"{record['scribble_file_name']}: not of the size of {record['file_name']}")
        for kind, label in (("scribble", scribble), ("sem_seg", mask)):
            if (unknown := label[(label != IGNORED) & (label >= model.num_classes)]).size:
                raise BLPSegError(
                    f"{record[f'{kind}_file_name']}: label {unknown[0]}, but the model has {model.num_classes} "
                    "classes; name a data set with the model's classes"
                )
        if scale != 1:
            size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
            image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
            scribble, mask = (cv2.resize(x, size, interpolation=cv2.INTER_NEAREST_EXACT) for x in (scribble, mask))
        diagnosis.add(image, scribble, mask)
    return diagnosis
