"""The mIoU that is estimated from strokes, against loops, a population that is known."""

import shutil

import cv2
import numpy as np
import pytest
import torch

from blpseg.data.datasets import load_records, split_records
from blpseg.evaluation import build_evaluator, evaluate
from blpseg.evaluation.from_scribbles import (
    LARGEST_WEIGHT,
    PRIOR_PIXELS,
    SHARED_PIXELS,
    STRATA,
    ConfusionEstimate,
    Counts,
    strata,
)
from blpseg.utils.errors import BLPSegError

CLASSES, LEVELS = 3, 4  # the strata used here


def confusion_by_loop(images):
    """The estimate, a pixel at a time, of (prediction, label, stratum) lists; label -1 = not annotated."""
    there, taken = [0] * LEVELS, [0] * LEVELS
    for _, label, stratum in images:
        for y, s in zip(label, stratum, strict=True):
            there[s] += 1
            taken[s] += y >= 0
    mean = sum(taken) / sum(there)
    probability = [(n + PRIOR_PIXELS * mean) / (m + PRIOR_PIXELS) for n, m in zip(taken, there, strict=True)]

    def distribution(some, k):
        """Weighted shares of the labels among the annotated pixels that are predicted as k; zeros without any."""
        mass = [0.0] * CLASSES
        for prediction, label, stratum in some:
            for p, y, s in zip(prediction, label, stratum, strict=True):
                if p == k and y >= 0:
                    mass[y] += min(1 / probability[s], LARGEST_WEIGHT / mean)
        return [m / sum(mass) if sum(mass) else 0.0 for m in mass]

    every = [0.0] * CLASSES
    for _, label, stratum in images:
        for y, s in zip(label, stratum, strict=True):
            if y >= 0:
                every[y] += min(1 / probability[s], LARGEST_WEIGHT / mean)
    confusion = np.zeros((CLASSES, CLASSES))
    for image in images:
        annotated = sum(y >= 0 for y in image[1])
        share = annotated / (annotated + SHARED_PIXELS * (1 - annotated / len(image[1])))
        for k in range(CLASSES):
            area, own, shared = image[0].count(k), distribution([image], k), distribution(images, k)
            shared = shared if sum(shared) else [m / sum(every) for m in every]
            for y in range(CLASSES):
                mixed = share * own[y] + (1 - share) * shared[y] if sum(own) else shared[y]
                confusion[k, y] += area * mixed
    return confusion


def counted(prediction, label, stratum):
    drawn = label >= 0
    cells = np.stack([prediction[drawn], label[drawn], stratum[drawn]], axis=1)
    areas, there = np.bincount(prediction, minlength=CLASSES), np.bincount(stratum, minlength=STRATA)
    return Counts(areas, there, *np.unique(cells, axis=0, return_counts=True))


def population(rng, count, rates):
    """Pixels of which those of a low stratum are seldom right and seldom annotated."""
    stratum = rng.integers(0, LEVELS, count)
    label = rng.choice(CLASSES, count, p=[0.6, 0.3, 0.1])
    wrong = rng.random(count) < np.array([0.5, 0.3, 0.1, 0.02])[stratum]
    prediction = np.where(wrong, rng.integers(0, CLASSES, count), label)
    annotated = rng.random(count) < np.asarray(rates)[stratum]
    return prediction, label, np.where(annotated, label, -1), stratum


def test_confusion_agrees_with_a_plain_loop():
    rng = np.random.default_rng(0)
    images = [population(rng, n, [0.01, 0.1, 0.3, 0.6]) for n in (300, 200, 50)]
    images[2][0][:] = 2  # a prediction that is annotated in some images only
    images = [(p, label, s) for p, _, label, s in images]
    expected = confusion_by_loop([tuple(x.tolist() for x in image) for image in images])
    estimate = ConfusionEstimate([counted(*image) for image in images])
    np.testing.assert_allclose(estimate(np.ones(3)), expected, rtol=1e-12)
    unseen = [(p, np.where(p == 1, -1, label), s) for p, label, s in images]  # nobody drew where it predicts 1
    expected = confusion_by_loop([tuple(x.tolist() for x in image) for image in unseen])
    found = ConfusionEstimate([counted(*image) for image in unseen])(np.ones(3))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[1].sum() == pytest.approx(sum((p == 1).sum() for p, *_ in images))
    twice = ConfusionEstimate([counted(*image) for image in (*images, images[1])])
    np.testing.assert_allclose(estimate(np.array([1, 2, 1])), twice(np.ones(4)), rtol=1e-12)


def ious(confusion):
    return np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))


def test_population_is_found_again_where_plain_accuracy_flatters():
    rng = np.random.default_rng(1)
    images, true, plain = [], np.zeros((CLASSES, CLASSES)), np.zeros((CLASSES, CLASSES))
    for _ in range(20):
        prediction, truth, label, stratum = population(rng, 20_000, [0.01, 0.03, 0.1, 0.3])
        images.append(counted(prediction, label, stratum))
        np.add.at(true, (prediction, truth), 1)
        np.add.at(plain, (prediction[label >= 0], label[label >= 0]), 1)
    expected = ious(true).mean()
    assert ious(plain).mean() > expected + 0.1
    assert ious(ConfusionEstimate(images)(np.ones(20))).mean() == pytest.approx(expected, abs=0.01)


def test_strata_tell_distances_and_odds_apart():
    prediction = np.zeros((8, 40), np.uint8)
    prediction[:, 20:] = 1
    near_and_far = strata(prediction, None)
    assert near_and_far[4, 19] == near_and_far[4, 20] == 0 < near_and_far[4, 0]
    with_odds = strata(prediction, np.full(prediction.shape, 0.5, np.float32))
    assert len(np.unique(with_odds - near_and_far)) == 1
    assert (strata(prediction, np.full(prediction.shape, 0.9, np.float32)) > with_odds).all()


def test_held_out_images_depend_on_their_names_alone():
    records = [{"image_id": f"photo{i}"} for i in range(1000)]
    kept, held_out = split_records(records, 0.2)
    assert 150 < len(held_out) < 250 and len(kept) + len(held_out) == 1000
    assert split_records(records[::2], 0.2)[1] == [r for r in records[::2] if r in held_out]
    assert split_records(records, 0.0) == (records, [])
    slices = [{"image_id": f"p{p}_{i}", "volume_id": f"p{p}"} for p in range(40) for i in range(5)]
    for part in split_records(slices, 0.3):
        assert part and all(sum(s["volume_id"] == r["volume_id"] for s in part) == 5 for r in part)
    assert split_records([{"file_name": "a"}], 0.0)[0], "Detectron2's standard records have no image_id"


def test_no_patient_is_on_both_sides(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for part in ("images", "scribbles"):
        (tmp_path / f"acdc_png/{part}/train").mkdir(parents=True)
        for patient in range(30):
            for frame in (1, 12):
                name = f"patient{patient:03}_frame{frame:02}_slice_1.png"
                cv2.imwrite(str(tmp_path / f"acdc_png/{part}/train/{name}"), np.zeros((4, 4), np.uint8))
    patients = [{r["subject"] for r in part} for part in split_records(load_records("acdc_scribble_train"), 0.3)]
    assert all(patients) and not patients[0] & patients[1] and len(patients[0] | patients[1]) == 30


@pytest.fixture
def without_masks(made_folder):
    """Strokes of the validation images take the place of their masks."""
    shutil.copytree(made_folder / "masks/val", made_folder / "scribbles/val", dirs_exist_ok=True)
    shutil.rmtree(made_folder / "masks/val")
    return made_folder


class Known(torch.nn.Module):
    """Predicts class 1 in the left half, 0 elsewhere."""

    def forward(self, batched_inputs):
        outputs = []
        for x in batched_inputs:
            height, width = x["image"].shape[-2:]
            logits = torch.zeros(3, height, width)
            logits[0], logits[1, :, : width // 2] = 0.5, 1.0
            outputs.append({"sem_seg": logits})
        return outputs


def test_full_strokes_give_the_true_score(made_cfg, without_masks, tmp_path, capsys):
    cfg = made_cfg("OUTPUT_DIR", str(tmp_path / "out"), "TEST.AUG.ENABLED", False)
    results = evaluate(cfg, Known())["scribbles"]
    confusion = np.zeros((3, 3))
    for record in load_records("made_val"):
        label = cv2.imread(record["scribble_file_name"], cv2.IMREAD_UNCHANGED)
        prediction = np.zeros_like(label)
        prediction[:, : label.shape[1] // 2] = 1
        np.add.at(confusion, (prediction, label), 1)
    with np.errstate(invalid="ignore"):
        expected = 100 * ious(confusion)
    assert results["mIoU"] == pytest.approx(expected.mean(), abs=1e-9)
    assert results["mIoU_annotated_pixels"] == pytest.approx(expected.mean(), abs=1e-9)
    count = len(load_records("made_val"))
    assert count < 5 and np.isnan(results["mIoU_low"]) and np.isnan(results["mIoU_high"])
    assert "(fewer than 5 images: no interval)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda f: cv2.imwrite(str(f), np.zeros((5, 5), np.uint8)), "5 x 5"),
        (lambda f: cv2.imwrite(str(f), np.full((40, 52), 7, np.uint8)), "label value 7"),
        (lambda f: [cv2.imwrite(str(g), np.full_like(cv2.imread(str(g), 0), 255)) for g in f.parent.iterdir()],
         "no annotated pixel"),
    ],
    ids=["size", "value", "blank"],
)
def test_faulty_strokes_end_in_one_line(made_cfg, without_masks, tmp_path, fault, words):
    fault(without_masks / "scribbles/val/val0.png")
    evaluator = build_evaluator(made_cfg("OUTPUT_DIR", str(tmp_path / "out")), "made_val")
    with pytest.raises(BLPSegError, match=words):
        evaluator.check_labels()
