"""3-D Dice and HD95 against a plain loop over voxels."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from blpseg.evaluation import VolumeEvaluator, build_evaluator
from blpseg.utils.errors import BLPSegError

from .toys import CLASSES, IGNORE


def dice_by_loop(a, b, c):
    both = in_a = in_b = 0
    for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        if y != IGNORE:
            both += x == c and y == c
            in_a += x == c
            in_b += y == c
    return 2 * both / (in_a + in_b) if in_a + in_b else None


def surface(mask):
    """Voxels of the mask with a 6-neighbour outside it, as coordinates."""
    voxels = {tuple(v) for v in np.argwhere(mask)}
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    return [v for v in voxels if any(tuple(np.add(v, s)) not in voxels for s in steps)]


def hd95_by_loop(a, b, spacing):
    """95th percentile of all distances from either surface to the other."""
    one, other = (np.array(surface(mask)) * spacing for mask in (a, b))
    pairs = ((one, other), (other, one))
    distances = [np.sqrt(((there - p) ** 2).sum(1)).min() for here, there in pairs for p in here]
    return np.percentile(distances, 95)


def run(evaluator, records, predictions):
    evaluator.reset()
    for record, prediction in zip(records, predictions, strict=True):
        evaluator.process([record], [{"sem_seg": torch.from_numpy(prediction)}])
    return evaluator.evaluate()["volume"]


@pytest.mark.parametrize("spacing", [None, (8.0, 1.5, 1.25)])
def test_against_the_loop(dataset, spacing):
    # Slices come out of order and the volumes are mixed.
    volumes = [("p1_f1", 1), ("p2_f1", 0), ("p1_f1", 0), ("p2_f1", 1), ("p1_f1", 2)]
    records = dataset(5, size=(21, 22), evaluator_type="sem_seg_volume", volumes=volumes)
    if spacing:
        for record in records:
            record["spacing"] = spacing
    labels = [np.array(Image.open(r["sem_seg_file_name"])) for r in records]
    predictions = [np.where(np.roll(label, 3, axis=1) == IGNORE, 0, np.roll(label, 3, axis=1)) for label in labels]
    predictions[1][4:9, 4:9] = 3  # class 3 is predicted in volume p2_f1 and stands in no mask
    result = run(VolumeEvaluator("toy_val"), records, predictions)

    dice, hd95 = {}, {}
    for volume in ("p1_f1", "p2_f1"):
        order = sorted((i for i in range(5) if volumes[i][0] == volume), key=lambda i: volumes[i][1])
        a, b = np.stack([predictions[i] for i in order]), np.stack([labels[i] for i in order])
        a = np.where(b == IGNORE, IGNORE, a)
        for c in (1, 2, 3):
            dice[volume, c] = dice_by_loop(a, b, c)
            both = (a == c).any() and (b == c).any()
            hd95[volume, c] = hd95_by_loop(a == c, b == c, spacing or (1, 1, 1)) if both else None
    assert dice["p1_f1", 3] is None and dice["p2_f1", 3] == 0  # in neither; in the prediction alone
    assert result["HD95_undefined"] == 1

    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values)

    patients = ("p1_f1", "p2_f1")
    assert result["Dice"] == pytest.approx(100 * mean([mean([dice[p, c] for c in (1, 2, 3)]) for p in patients]))
    assert result["HD95"] == pytest.approx(mean([mean([hd95[p, c] for c in (1, 2, 3)]) for p in patients]))
    for c in (1, 2):
        assert result[f"Dice-{CLASSES[c]}"] == pytest.approx(100 * mean([dice[p, c] for p in patients]))
        assert result[f"HD95-{CLASSES[c]}"] == pytest.approx(mean([hd95[p, c] for p in patients]))
    assert result["Dice-never"] == 0 and math.isnan(result["HD95-never"])


def test_perfect_prediction(dataset):
    records = dataset(2, evaluator_type="sem_seg_volume", volumes=[("a", 0), ("a", 1)])
    labels = [np.array(Image.open(r["sem_seg_file_name"])) for r in records]
    result = run(VolumeEvaluator("toy_val"), records, [np.where(y == IGNORE, 1, y) for y in labels])
    assert result["Dice"] == 100 and result["HD95"] == 0


def test_built_by_metadata_and_records_are_checked(dataset, toy_cfg):
    records = dataset(2, evaluator_type="sem_seg_volume", volumes=[("a", 0), ("a", 1)])
    assert isinstance(build_evaluator(toy_cfg, "toy_val"), VolumeEvaluator)
    del records[1]["volume_id"]
    with pytest.raises(BLPSegError, match="img1.png: record without volume_id"):
        build_evaluator(toy_cfg, "toy_val")


def test_slices_of_different_sizes_are_refused(dataset):
    records = dataset(2, evaluator_type="sem_seg_volume", volumes=[("a", 0), ("a", 1)])
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(records[1]["sem_seg_file_name"])
    with pytest.raises(BLPSegError, match="img0.png and .*img1.png: slices of one volume differ"):
        run(VolumeEvaluator("toy_val"), records, [np.zeros((40, 56), np.uint8), np.zeros((40, 50), np.uint8)])


def test_missing_medpy_is_one_clear_line(dataset, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "medpy.metric", None)
    dataset(1, evaluator_type="sem_seg_volume", volumes=[("a", 0)])
    with pytest.raises(BLPSegError, match=r"pip install 'blpseg\[medical\]'"):
        VolumeEvaluator("toy_val")
