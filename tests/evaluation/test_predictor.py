"""The Predictor on a tiny BLPSeg model with random weights."""

import re
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from PIL import Image

import blpseg
from blpseg import Predictor, get_cfg
from blpseg.utils.errors import BLPSegError

from .toys import make_image

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/Base-BLPSeg-R18.yaml")
NARROW = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 16, "MODEL.BLPSEG.HEAD_CHANNELS", 16]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    cfg = get_cfg(CONFIG, [*NARROW, "MODEL.WEIGHTS", str(path)])
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, path)
    return cfg


@pytest.fixture(scope="module")
def predictor(cfg):
    return Predictor(cfg)


def test_an_array_gives_the_models_logits(cfg, predictor):
    image = make_image(0, 45, 60)
    result = predictor(image[..., ::-1])  # BGR in
    rgb = torch.from_numpy(image).permute(2, 0, 1)
    with torch.no_grad():
        expected = predictor.model([{"image": rgb}])[0]["sem_seg"].numpy()
    assert result["logits"].shape == (4, 45, 60) and result["logits"].dtype == np.float32
    np.testing.assert_array_equal(result["logits"], expected)
    np.testing.assert_array_equal(result["sem_seg"], expected.argmax(0))
    assert result["sem_seg"].dtype == np.uint8
    assert set(result) == {"sem_seg", "logits"}


def test_every_kind_of_image_gives_the_same(predictor, tmp_path):
    image = make_image(1, 40, 44)
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    expected = predictor(image[..., ::-1])["logits"]
    for same in (str(path), path, Image.fromarray(image), cv2.imread(str(path))):
        np.testing.assert_array_equal(predictor(same)["logits"], expected)
    grey = image[..., 0]
    np.testing.assert_array_equal(predictor(grey)["logits"], predictor(np.stack([grey] * 3, axis=2))["logits"])


def test_channel_order_of_the_config(cfg, predictor):
    swapped = cfg.clone()
    swapped.INPUT.FORMAT = "BGR"
    image = make_image(2, 40, 44)
    np.testing.assert_array_equal(Predictor(swapped)(image)["logits"], predictor(image[..., ::-1])["logits"])


def test_lists_keep_order_and_agree_with_single_images(predictor):
    images = [make_image(i, *size) for i, size in enumerate([(40, 44), (32, 50), (40, 44), (40, 44)])]
    for image, result in zip(images, predictor(images), strict=True):
        np.testing.assert_allclose(result["logits"], predictor(image)["logits"], atol=1e-3, rtol=1e-4)
    assert len(predictor(np.stack([images[0], images[2]]))) == 2
    assert predictor([]) == []


def test_threads_share_one_predictor(predictor):
    images = [make_image(i, 40, 44) for i in range(6)]
    expected = [predictor(image)["logits"] for image in images]
    results = [None] * len(images)

    def work(start):
        for i in range(start, len(images), 3):
            results[i] = predictor(images[i])["logits"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, same in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, same, atol=1e-3, rtol=1e-4)


def test_annotation_probability(predictor):
    image = make_image(0, 45, 60)
    result = predictor(image, annotation=True)
    probability = result["annotation_prob"]
    assert probability.shape == (5, 45, 60)
    np.testing.assert_allclose(probability.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(result["logits"], predictor(image)["logits"])
    tensor = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)
    with torch.no_grad():
        (expected,) = predictor.model.inspect([{"image": tensor}])
    np.testing.assert_allclose(probability, expected["annotation_prob"], atol=1e-6)


def test_annotation_probability_is_of_the_size_that_the_network_is_trained_on(cfg, predictor):
    large = cfg.clone()
    large.INPUT.LONGEST_SIDE = 64
    image = make_image(0, 96, 128)
    tensor = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    half = F.interpolate(tensor, (48, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        (maps,) = predictor.model.inspect([{"image": half[0]}])
    expected = F.interpolate(maps["annotation_prob"][None], (96, 128), mode="bilinear")[0]
    np.testing.assert_allclose(Predictor(large)(image, annotation=True)["annotation_prob"], expected, atol=1e-6)


def test_test_time_settings_are_used(cfg, predictor):
    from blpseg.evaluation import Inference

    many = cfg.clone()
    many.TEST.AUG.ENABLED = True
    image = make_image(0, 64, 80)
    expected = Inference(predictor.model, scales=(0.5, 0.75, 1.0, 1.25), flip=True)(
        [{"image": torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)}]
    )
    np.testing.assert_array_equal(Predictor(many)(image)["logits"], expected[0]["sem_seg"].numpy())

    small = cfg.clone()
    small.TEST.TILE.ABOVE, small.TEST.TILE.SIZE, small.TEST.TILE.OVERLAP = 1000, 32, 8
    tiled = Predictor(small, return_logits=False)(image, annotation=True)
    assert set(tiled) == {"sem_seg", "annotation_prob"}
    assert tiled["sem_seg"].shape == (64, 80) and tiled["annotation_prob"].shape == (5, 64, 80)
    assert (tiled["sem_seg"] != predictor(image)["sem_seg"]).any()


def test_crf(cfg, predictor):
    pytest.importorskip("pydensecrf")
    from blpseg.evaluation.crf import DenseCRF

    with_crf = cfg.clone()
    with_crf.TEST.CRF.ENABLED = True
    image = make_image(0, 40, 44)
    plain = predictor(image)
    result = Predictor(with_crf)(image)
    np.testing.assert_array_equal(result["logits"], plain["logits"])
    np.testing.assert_array_equal(result["sem_seg"], DenseCRF()(plain["logits"], image[..., ::-1]))


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((4, 4, 4), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        ("nowhere.png", "nowhere.png"),
        (7, "not int"),
    ],
)
def test_odd_images_are_refused(predictor, image, message):
    with pytest.raises(BLPSegError, match=message):
        predictor(image)


def test_unusable_configs_are_refused(cfg, tmp_path):
    for options, message in (
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        (["MODEL.WEIGHTS", str(tmp_path / "none.pth")], "none.pth"),
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5], "model.pth"),
    ):
        other = cfg.clone()
        other.merge_from_list(options)
        with pytest.raises(BLPSegError, match=message):
            blpseg.Predictor(other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_cpu_is_used(cfg, caplog):
    cfg.MODEL.DEVICE = "cuda"
    assert Predictor(cfg).model.device.type == "cpu"
    assert "there is no GPU here" in caplog.text


def test_the_readme_example_runs(tmp_path, monkeypatch):
    """The Python block with a Predictor, in a folder where its checkpoint and its image are."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    example = next((block for block in blocks if "Predictor(" in block), None)
    if example is None:
        pytest.skip("README.md has no Python block with a Predictor")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    config = get_cfg(re.search(r"configs/[\w./-]+\.yaml", example)[0], ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    for name in re.findall(r"[\w./-]+\.(?:pth|png|jpg)", example):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pth":
            torch.save({"model": build_model(config).state_dict()}, path)
        else:
            Image.fromarray(make_image(0, 40, 44)).save(path)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_agrees_with_cpu(cfg, predictor):
    on_gpu = cfg.clone()
    on_gpu.MODEL.DEVICE = "cuda"
    image = make_image(0, 64, 80)
    gpu, cpu = Predictor(on_gpu)(image)["logits"], predictor(image)["logits"]
    np.testing.assert_allclose(gpu, cpu, atol=0.02 * np.abs(cpu).max())


def test_a_path_is_no_config():
    with pytest.raises(BLPSegError, match="takes a config, as get_cfg"):
        Predictor("leaves/config.yaml")
