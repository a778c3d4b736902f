"""Dense CRF against mean field with full kernel matrices, and its place in an evaluation."""

import multiprocessing
import sys

import numpy as np
import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from PIL import Image

from blpseg.evaluation import evaluate
from blpseg.utils.errors import BLPSegError

from .toys import ColorModel, load_inputs, make_image, make_mask

crf = pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")

from blpseg.evaluation.crf import CRFEvaluator, DenseCRF  # noqa: E402


def mean_field(logits, image):
    """One step of mean field with the numbers of METHOD section 7; kernels normalised symmetrically."""
    classes, height, width = logits.shape
    rows, columns = np.mgrid[:height, :width]
    place = np.stack([rows.ravel(), columns.ravel()], 1).astype(float)
    color = image.reshape(-1, 3).astype(float)

    def kernel(*scaled):
        distance = sum(((f[:, None] - f[None]) ** 2).sum(-1) for f in scaled)
        k = np.exp(-distance / 2)
        scale = 1 / np.sqrt(k.sum(1) + 1e-20)
        return k * scale[:, None] * scale

    unary = -torch.from_numpy(logits).softmax(0).clamp(1e-5, 1).log().numpy().reshape(classes, -1)
    q = np.exp(-unary) / np.exp(-unary).sum(0)
    energy = unary - 3 * q @ kernel(place / 3) - 10 * q @ kernel(place / 32, color / 13)
    return energy.argmin(0).reshape(height, width)


def noisy_scene():
    rng = np.random.default_rng(0)
    mask = make_mask(5, 36, 40) % 4
    image = (np.array([[20, 20, 20], [220, 40, 40], [40, 220, 40], [90, 90, 200]])[mask]).astype(np.uint8)
    image += rng.integers(0, 12, image.shape, dtype=np.uint8)
    logits = np.eye(4)[mask].transpose(2, 0, 1) + rng.normal(0, 0.8, (4, *mask.shape))
    return mask, image, logits.astype(np.float32)


def test_against_full_kernels():
    mask, image, logits = noisy_scene()
    expected = mean_field(logits, image)
    result = DenseCRF()(logits, image)
    assert result.dtype == np.uint8 and result.shape == mask.shape
    # The library's lattice approximates the kernels.
    assert (result == expected).mean() > 0.97
    assert (result == mask).mean() > (logits.argmax(0) == mask).mean() + 0.1


def test_every_parameter_is_used():
    # An odd scene: enough energy everywhere that no term is lost in the others.
    logits = np.random.default_rng(1).normal(0, 1, (4, 30, 34)).astype(np.float32)
    image = make_image(2, 30, 34)
    plain = DenseCRF()(logits, image)
    changes = {
        "iterations": 5, "gaussian_sxy": 1, "gaussian_compat": 0.1, "bilateral_sxy": 3, "bilateral_srgb": 100,
        "bilateral_compat": 0.5,
    }  # fmt: skip
    for name, value in changes.items():
        assert (DenseCRF(**{name: value})(logits, image) != plain).any(), name


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_evaluation_is_that_of_the_refined_maps(dataset, toy_cfg, image_format):
    records, model = dataset(3), ColorModel(4)
    toy_cfg.INPUT.FORMAT = image_format
    toy_cfg.TEST.CRF.ENABLED = True
    toy_cfg.TEST.CRF.NUM_WORKERS = 1
    toy_cfg.TEST.WRITE_PREDICTIONS = True
    evaluate(toy_cfg, model)
    inputs = load_inputs(records)  # RGB
    if image_format == "BGR":
        inputs = [{**x, "image": x["image"].flip(0)} for x in inputs]
    with torch.no_grad():
        outputs = model(inputs)
    for record, output in zip(records, outputs, strict=True):
        name = f"{toy_cfg.OUTPUT_DIR}/inference/toy_val/results/toy/Segmentation/comp6_val_cls/{record['image_id']}.png"
        expected = DenseCRF.from_config(toy_cfg)(output["sem_seg"].numpy(), np.array(Image.open(record["file_name"])))
        assert (np.array(Image.open(name)) == expected).all()


@pytest.mark.parametrize("ranks,workers,processes", [(1, 0, 8), (3, 0, 2), (16, 0, 1), (3, 5, 5)])
def test_ranks_of_a_machine_share_its_cores(monkeypatch, ranks, workers, processes):
    monkeypatch.setattr("blpseg.evaluation.crf.default_workers", lambda: 8)
    monkeypatch.setattr("detectron2.utils.comm.get_local_size", lambda: ranks)
    before = len(multiprocessing.active_children())
    evaluator = CRFEvaluator(DatasetEvaluator(), DenseCRF(), workers)
    evaluator.reset()
    assert len(multiprocessing.active_children()) - before == processes
    evaluator.evaluate()


def test_missing_package_is_one_clear_line(dataset, toy_cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    dataset(1)
    toy_cfg.TEST.CRF.ENABLED = True
    with pytest.raises(BLPSegError, match=r"pip install 'blpseg\[crf\]'"):
        evaluate(toy_cfg, ColorModel(4))
