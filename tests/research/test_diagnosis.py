"""The diagnosis against counting by hand, and its aggregation weights against the aggregation itself."""

import json
import runpy

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from blpseg import get_cfg
from blpseg.modeling.local_aggregation import aggregation_weights, local_aggregation
from blpseg.utils.errors import BLPSegError
from datasets.make_synthetic import make_synthetic
from research.diagnose import Diagnosis, diagnose


@pytest.mark.parametrize("impl,radius", [("dense", np.inf), ("window", 2.25)])
def test_weights_are_those_of_the_aggregation(impl, radius):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 6, 7, generator=generator, dtype=torch.float64)
    features = torch.randn(1, 4, 6, 7, generator=generator, dtype=torch.float64)
    positions = torch.tensor([0, 9, 41, 20])
    weights = aggregation_weights(features[0], 1.5, positions, radius)
    expected = local_aggregation(logits, features, 1.5, impl=impl, window=1.5)[0].flatten(1)[:, positions]
    torch.testing.assert_close((weights @ logits[0].flatten(1).T).T, expected)


@pytest.fixture
def diagnosis(tiny_cfg):
    torch.manual_seed(0)
    return Diagnosis(build_model(tiny_cfg), positions=1000)


def test_counts_by_hand(diagnosis):
    # Two halves; distances to the boundary 1..16 on the left, 1..16 on the right.
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 3
    mask[:2] = 255
    scribble = np.full((32, 32), 255, np.uint8)
    scribble[10, 2:6] = 0
    scribble[20, 17] = 3
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    diagnosis.add(image, scribble, mask)
    model = diagnosis.model
    inputs = {
        "image": torch.from_numpy(image.transpose(2, 0, 1).copy()),
        "scribble": torch.from_numpy(np.where(scribble == 255, 5, scribble).astype(np.int64)),
        "image_classes": torch.tensor([True, False, False, True, False]),
    }
    found = model.inspect([inputs])[0]
    rows = {row["distance to boundary, px"]: row for row in diagnosis.by_distance()}
    everything = rows["all"]
    assert everything["annotated"] == pytest.approx(100 * 5 / (30 * 32))
    q = found["annotation_prob"].numpy()
    assert everything["believed to be"] == pytest.approx(100 * (1 - q[-1][2:]).mean(), rel=1e-4)
    at = [(10, 2), (10, 3), (10, 4), (10, 5), (20, 17)]
    p = found["sem_seg"].softmax(0).numpy()
    of_label = [(p[scribble[y, x], y, x], q[scribble[y, x], y, x]) for y, x in at]
    assert everything["p of label"] == pytest.approx(np.mean([a for a, _ in of_label]), rel=1e-4)
    class_q = [q[scribble[y, x], y, x] / q[:-1, y, x].sum() for y, x in at]
    assert everything["q, of the class alone"] == pytest.approx(np.mean(class_q), rel=1e-3)
    assert everything["BLP weight"] == pytest.approx(np.mean([(1 - a * b) ** 2 for a, b in of_label]), rel=1e-4)
    # (20, 17) is two pixels from the other half; the others 10 to 13 from it, and 8 from the ignored rows.
    assert rows["2-4"]["annotated"] > 0 and rows["8-16"]["annotated"] > 0 and rows["0-2"]["annotated"] == 0
    pseudo, inside = found["pseudo_label"].numpy(), np.zeros((32, 32), bool)
    inside[2:] = True
    by_class = diagnosis.by_class([str(c) for c in range(5)])
    assert [row["share of the mask"] for row in by_class] == [50, 0, 0, 50, 0]
    assert [row["of the scribbles"] for row in by_class] == [80, 0, 0, 20, 0]
    for row in by_class[::3]:
        own = inside & (mask == int(row["class"]))
        assert row["its pixels with one"] == pytest.approx(100 * (pseudo[own] != 255).mean())
        assert row["with the right one"] == pytest.approx(100 * (pseudo[own] == int(row["class"])).mean())
        share = (pseudo[inside] == int(row["class"])).sum() / (pseudo[inside] != 255).sum()
        assert row["of the pseudo labels"] == pytest.approx(100 * share)
    assert sum(row["share of pixels"] for name, row in rows.items() if name != "all") == pytest.approx(100)


def test_aggregation_of_a_model_whose_features_are_all_alike(diagnosis):
    for parameter in diagnosis.model.local_aggregation.embedding.parameters():
        torch.nn.init.zeros_(parameter)
    mask = np.zeros((32, 32), np.uint8)
    image = np.zeros((32, 32, 3), np.uint8)
    diagnosis.add(image, mask, mask)
    found = diagnosis.of_aggregation()
    # Then only the distance counts, and one class is all there is.
    sigma = diagnosis.model.local_aggregation.sigma
    y, x = np.mgrid[:8, :8].reshape(2, 64)
    squared = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    weight = np.exp(-squared / (2 * sigma**2))
    weight /= weight.sum(axis=1, keepdims=True) + 64e-7
    assert found["weight on the position itself"] == pytest.approx(weight.diagonal().mean(), rel=1e-5)
    assert found["effective number of positions"] == pytest.approx((1 / (weight**2).sum(axis=1)).mean(), rel=1e-5)
    assert found["mean distance, cells"] == pytest.approx((weight * np.sqrt(squared)).sum(axis=1).mean(), rel=1e-5)
    assert found["weight on the same class"] == pytest.approx(1, rel=1e-5)
    own, number = weight.diagonal(), 1 / (weight**2).sum(axis=1)  # all 64 positions are looked at, fewer than 128
    assert found["positions with over 0.9 on themselves, %"] == 0
    assert found["positions with under 0.1 on themselves, %"] == pytest.approx(100 * (own < 0.1).mean())
    for share, name in ((0.25, "lower quartile"), (0.5, "median"), (0.75, "upper quartile")):
        ordered, at = np.sort(number), share * 63
        low = ordered[int(at)] * (1 - at % 1) + ordered[min(63, int(at) + 1)] * (at % 1)
        assert found[f"effective number, {name}"] == pytest.approx(low, rel=1e-5)


def test_without_aggregation(tiny_cfg):
    tiny_cfg.MODEL.BLPSEG.LAM.ENABLED = False
    diagnosis = Diagnosis(build_model(tiny_cfg))
    mask = np.zeros((32, 32), np.uint8)
    diagnosis.add(np.zeros((32, 32, 3), np.uint8), mask, mask)
    assert diagnosis.of_aggregation() == {} and diagnosis.by_distance()[-1]["annotated"] == 100


@pytest.fixture
def command(tmp_path, root, monkeypatch):
    """Runs research/diagnose.py here, on generated scenes and a model that has learned nothing -> its exit status."""
    make_synthetic(str(tmp_path / "synthetic"), size=(48, 48), train=3, val=1, seed=0)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    config = root / "configs/Synthetic-Scribble/blpseg_tiny.yaml"
    torch.manual_seed(0)
    torch.save(build_model(get_cfg(str(config))).state_dict(), tmp_path / "weights.pth")

    def command(*arguments, opts=()) -> int:
        words = ["diagnose.py", "--config-file", config, *arguments, "--opts", *opts]
        monkeypatch.setattr("sys.argv", [str(x) for x in [*words, "MODEL.WEIGHTS", tmp_path / "weights.pth"]])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(root / "research/diagnose.py"), run_name="__main__")
        return ended.value.code or 0

    return command


def test_command_prints_and_writes_the_same(command, tmp_path, capsys):
    assert command("--output", tmp_path / "new" / "found.json") == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert found["images"] == 3 and found["data"] == "synthetic_scribble_train" and found["scale"] == 1
    assert "synthetic_scribble_train: 3 images at 1 of their size" in printed
    everything = found["by distance"][-1]
    assert everything["share of pixels"] == pytest.approx(100) and f"{everything['annotated']:.3f}" in printed
    assert [row["class"] for row in found["by class"]][:2] == ["background", "disc"]
    assert f"{found['aggregation']['mIoU of the logits after']:.3f}" in printed


def test_mistakes_are_one_line(command, capsys):
    for options, message in (
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty; name a data set with --dataset"),
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"], "NUM_CLASSES 3"),
    ):
        assert command(opts=options) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in line


def test_labels_that_the_model_does_not_have(tmp_path, tiny_cfg):
    image, label = np.zeros((16, 16, 3), np.uint8), np.full((16, 16), 5, np.uint8)
    for name, array in (("image", image), ("scribble", label), ("mask", label)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), array)
    record = {
        "file_name": str(tmp_path / "image.png"),
        "scribble_file_name": str(tmp_path / "scribble.png"),
        "sem_seg_file_name": str(tmp_path / "mask.png"),
    }
    with pytest.raises(BLPSegError, match=r"scribble\.png: label 5, but the model has 5 classes"):
        diagnose(build_model(tiny_cfg), [record], 255, "RGB", 1.0)
