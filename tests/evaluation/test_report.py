"""The report's measures against loops over pixels, and its files."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blpseg.evaluation import evaluate
from blpseg.evaluation.report import annotation_rate, mean_iou, rare_confusion
from blpseg.utils.geometry import DISTANCE_EDGES, THICKNESS_EDGES

from ..utils.test_geometry import places_by_loop
from .toys import CLASSES, IGNORE, ColorModel, load_inputs, make_mask


def test_mean_iou_by_hand():
    # [prediction, label]: class 0: 3 / (3 + 1 + 2), class 1: 4 / (4 + 2 + 1), class 2 in no label
    confusion = np.array([[3, 2, 0], [1, 4, 0], [0, 0, 0]])
    assert mean_iou(confusion) == pytest.approx(100 * (3 / 6 + 4 / 7) / 2)
    assert math.isnan(mean_iou(np.zeros((2, 2))))


def test_rare_confusion_by_hand():
    # Three bins; label 0 has 8, 4 and 20 pixels in them, label 1 has 2, 6 and 0.
    confusion = np.array([[[8, 0], [0, 2]], [[0, 6], [4, 0]], [[20, 0], [0, 0]]])
    rate = np.array([[0.5, 0.1], [0.1, 0.3], [0.2, 0.2]])
    # A quarter of label 0 is 8 pixels: bin 1 (4 pixels, predicted 1) and 4 of bin 2 (predicted 0).
    # A quarter of label 1 is 2 pixels: bin 0 (predicted 1).
    np.testing.assert_allclose(rare_confusion(confusion, rate, 0.25), [[4, 0], [4, 2]])
    # All of it is the sum.
    np.testing.assert_allclose(rare_confusion(confusion, rate, 1.0), confusion.sum(0))


def test_annotation_rate_counts_by_place_and_class():
    mask = make_mask(3, 22, 26)
    scribble = np.full_like(mask, 255)
    scribble[8:12, 3:20] = mask[8:12, 3:20]
    distance, thickness = places_by_loop(mask)
    drawn, total = np.zeros((2, len(THICKNESS_EDGES), len(DISTANCE_EDGES), 4))
    for p in distance:
        if mask[p] != IGNORE:
            cell = thickness[p], max(i for i, edge in enumerate(DISTANCE_EDGES) if edge <= distance[p]), mask[p]
            total[cell] += 1
            drawn[cell] += scribble[p] != 255
    overall = drawn.sum((0, 1)) / np.maximum(total.sum((0, 1)), 1)
    np.testing.assert_allclose(annotation_rate([(scribble, mask)], 4), (drawn + overall) / (total + 1))


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("trained_on", ["rank", "scribbles"])
def test_files(dataset, toy_cfg, trained_on):
    records = dataset(5, scribbles=True)
    if trained_on == "scribbles":
        dataset(2, scribbles=True, name="toy_scribble_train")
        toy_cfg.DATASETS.TRAIN = ("toy_scribble_train",)
    model = ColorModel(4)
    toy_cfg.TEST.REPORT.ENABLED = True
    toy_cfg.TEST.REPORT.PANELS = 2
    results = evaluate(toy_cfg, model)
    folder = Path(toy_cfg.OUTPUT_DIR, "inference/toy_val/report")

    with torch.no_grad():
        predictions = [output["sem_seg"].argmax(0).numpy() for output in model(load_inputs(records))]
    labels = [np.array(Image.open(r["sem_seg_file_name"])) for r in records]
    labelled = [label != IGNORE for label in labels]

    regions = read_csv(folder / "regions.csv")
    groups = {row["group"] for row in regions}
    assert groups == {"distance to scribble", "distance to boundary", "local thickness"}
    for group in groups:  # every labelled pixel is in one bin of each
        assert sum(int(r["pixels"]) for r in regions if r["group"] == group) == sum(m.sum() for m in labelled)

    # One bin in full, from the definition: the pixels nearest to a scribble (all scribbles are the middle row).
    confusion = np.zeros((4, 4), int)
    for prediction, label, inside in zip(predictions, labels, labelled, strict=True):
        drawn = np.argwhere(inside & (np.arange(40) == 20)[:, None])
        for p in np.argwhere(inside):
            if np.sqrt(((drawn - p) ** 2).sum(1)).min() < DISTANCE_EDGES[1]:
                confusion[prediction[tuple(p)], label[tuple(p)]] += 1
    near = next(r for r in regions if r["group"] == "distance to scribble" and r["from_px"] == "0")
    assert int(near["pixels"]) == confusion.sum()
    assert float(near["mIoU"]) == pytest.approx(mean_iou(confusion), abs=1e-3)

    # The two parts of the set put the whole together again.
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rare_region_mIoU"] == pytest.approx(results["report"]["rare_region_mIoU"])
    assert summary["annotation_probability_from"].startswith(
        "scribbles and masks of 2" if trained_on == "scribbles" else "rank"
    )
    total = read_csv(folder / "confusion.csv")
    table = np.array([[int(row[name]) for name in CLASSES] for row in total])
    assert mean_iou(table.T) == pytest.approx(results["sem_seg"]["mIoU"])

    scores = []
    for prediction, label, inside in zip(predictions, labels, labelled, strict=True):
        table = np.zeros((4, 4), int)
        np.add.at(table, (prediction[inside], label[inside]), 1)
        scores.append(mean_iou(table))
    names = sorted(path.name for path in folder.glob("*_0*.png"))
    order = np.argsort(scores)
    expected = [f"worst_{i + 1:02d}_img{k}_mIoU{scores[k]:.1f}.png" for i, k in enumerate(order[:2])]
    expected += [f"best_{i + 1:02d}_img{k}_mIoU{scores[k]:.1f}.png" for i, k in enumerate(order[::-1][:2])]
    assert names == sorted(expected)
    for name in ("regions.png", "confusion.png", *names):
        assert np.array(Image.open(folder / name)).std() > 0


def test_without_scribbles_that_group_is_left_out(dataset, toy_cfg):
    dataset(1)
    toy_cfg.TEST.REPORT.ENABLED = True
    evaluate(toy_cfg, ColorModel(4))
    regions = read_csv(Path(toy_cfg.OUTPUT_DIR, "inference/toy_val/report/regions.csv"))
    assert {row["group"] for row in regions} == {"distance to boundary", "local thickness"}
