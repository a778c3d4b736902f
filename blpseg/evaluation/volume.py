"""Overlap and surface distance of three-dimensional segmentations (ACDC)."""

from __future__ import annotations

from collections import Counter, OrderedDict

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from ..utils.errors import BLPSegError
from ..utils.labels import IGNORED
from .sem_seg import SemSegEvaluator


class VolumeEvaluator(SemSegEvaluator):
    """:class:`SemSegEvaluator` on the slices, and 3-D Dice and 95 % Hausdorff distance on the volumes.

    Slices with one ``volume_id`` (a patient's frame), in the order of ``slice_index``, are one volume. For
    each volume and each class except the background, without the pixels that have the ignore label,

    * Dice = 2 |A and B| / (|A| + |B|), percent. 0 where only one of prediction and mask holds the class; a
      class that neither holds is left out of the means.
    * HD95 = 95th percentile of the distances between the two surfaces, in the unit of the records'
      ``spacing`` (slice, row, column; mm), and in voxels where a record has none. It exists only where both
      hold the class; ``HD95_undefined`` counts the pairs of volume and class in which just one does.

    ``Dice-<class>`` is the mean over volumes, ``Dice`` the mean over volumes of a volume's mean over classes
    ("the mean over patients of the 3-D Dice of classes 1..3", METHOD section 8); HD95 likewise.
    Both are MedPy's (``medpy.metric.binary.dc``, ``hd95``).
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, **options):
        """As :class:`SemSegEvaluator`.

        Raises:
            BLPSegError: MedPy is missing, or a record has no ``volume_id`` or ``slice_index``.
        """
        super().__init__(dataset_name, output_dir, **options)
        try:
            from medpy.metric import binary
        except ImportError as error:
            raise BLPSegError(f"evaluating volumes needs MedPy ({error}): pip install 'blpseg[medical]'") from error
        self._dice, self._hd95 = binary.dc, binary.hd95
        self._records = {}
        self._sizes: Counter[str] = Counter()  # slices of each volume
        for record in DatasetCatalog.get(dataset_name):
            for key in ("volume_id", "slice_index"):
                if key not in record:
                    raise BLPSegError(f"{record['file_name']}: record without {key}, which {dataset_name} needs")
            self._records[record["file_name"]] = record
            self._sizes[record["volume_id"]] += 1

    def reset(self) -> None:
        super().reset()
        self._slices: dict[str, list[tuple]] = {}  # of volumes that are not complete yet
        self._scores: dict[str, tuple] = {}

    def _process_pixels(self, x: dict, prediction: np.ndarray, label: np.ndarray) -> None:
        super()._process_pixels(x, prediction, label)
        record = self._records[x["file_name"]]
        found = (record["slice_index"], x["file_name"], prediction.astype(np.uint8), label)
        self._add(record["volume_id"], [found])

    def _add(self, volume_id: str, slices: list[tuple]) -> None:
        """Keep slices until their volume is complete; then only its scores."""
        kept = self._slices.setdefault(volume_id, [])
        kept += slices
        if len(kept) == self._sizes[volume_id]:
            self._scores[volume_id] = self._volume_scores(sorted(self._slices.pop(volume_id), key=lambda s: s[:2]))

    def evaluate(self) -> OrderedDict | None:
        """:meth:`SemSegEvaluator.evaluate` and ``"volume"``: ``Dice``, ``HD95``, ``HD95_undefined``, ``Dice-<class>``,
        ``HD95-<class>``.

        Raises:
            BLPSegError: slices of one volume differ in size.
        """
        results = super().evaluate()
        # Several processes may have had slices of one volume.
        gathered = comm.gather((self._slices, self._scores))
        if results is None:
            return None
        self._slices = {}
        for slices, scores in gathered:
            self._scores |= scores
            for volume_id, part in slices.items():
                self._add(volume_id, part)
        # What was not seen in whole, as in a run over some of the images, counts as it is.
        for volume_id, part in self._slices.items():
            self._scores[volume_id] = self._volume_scores(sorted(part, key=lambda s: s[:2]))
        ordered = [self._scores[volume_id] for volume_id in self._sizes if volume_id in self._scores]
        # (volumes, C - 1)
        dice, hd95, undefined = (np.array(column, dtype=float) for column in zip(*ordered, strict=True))
        results["volume"] = {
            "Dice": 100 * _mean(_mean(dice, 1)),
            "HD95": _mean(_mean(hd95, 1)),
            "HD95_undefined": int(undefined.sum()),
        }
        for i, name in enumerate(self._class_names[1:]):
            results["volume"][f"Dice-{name}"] = 100 * _mean(dice[:, i])
            results["volume"][f"HD95-{name}"] = _mean(hd95[:, i])
        return results

    def _volume_scores(self, volume: list[tuple]) -> tuple[list[float], list[float], list[bool]]:
        """Slices in order -> Dice, HD95 and "HD95 is undefined", each of C - 1 entries; NaN = left out."""
        shapes = {label.shape: file_name for _, file_name, _, label in volume}
        if len(shapes) > 1:
            raise BLPSegError(f"{' and '.join(list(shapes.values())[:2])}: slices of one volume differ in size")
        prediction, label = (np.stack(part) for part in list(zip(*volume, strict=True))[2:])
        spacing = self._records[volume[0][1]].get("spacing")
        inside = label != IGNORED
        dice, hd95, undefined = [], [], []
        for c in range(1, self._num_classes):
            a, b = (prediction == c) & inside, (label == c) & inside
            found, there = a.any(), b.any()
            dice.append(self._dice(a, b) if found or there else np.nan)
            hd95.append(self._hd95(a, b, voxelspacing=spacing) if found and there else np.nan)
            undefined.append(found != there)
        return dice, hd95, undefined


def _mean(values: np.ndarray, axis: int | None = None):
    """Mean of the values that are not NaN; NaN, without numpy's warning, where there is none."""
    count = np.isfinite(values).sum(axis=axis)
    total = np.nansum(values, axis=axis)
    mean = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
    return float(mean) if np.ndim(mean) == 0 else mean
