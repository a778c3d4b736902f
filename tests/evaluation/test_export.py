"""Exported files against eager execution, at sizes that were not traced."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

import blpseg
from blpseg.evaluation.export import InferenceGraph, _ExplicitPooling, export
from blpseg.utils.errors import BLPSegError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/Synthetic-Scribble/blpseg_tiny.yaml")
LITE = str(ROOT / "configs/Synthetic-Scribble/blpseg_lite.yaml")
SIZES = [(96, 128), (77, 131), (64, 40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(CONFIG, tmp_path_factory)


def make_checkpoint(config, tmp_path_factory):
    """Random weights, with logits of the size that a trained model has and a LAM that matters."""
    torch.manual_seed(0)
    opts = ["MODEL.WEIGHTS", "", "MODEL.TIMM.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    model = build_model(blpseg.get_cfg(config, opts)).eval()
    with torch.no_grad():
        model.sem_seg_head.predictor[-1].weight *= 0.1
        model.local_aggregation.embedding.projection.weight *= 0.5
    path = tmp_path_factory.mktemp("export") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return model, path


def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, 3, *size, generator=generator) * 255 for size in SIZES]


def eager(model, image):
    with torch.no_grad():
        return model([{"image": image[0]}])[0]["sem_seg"].numpy()


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=lambda config: Path(config).stem)
def test_files_of_the_tool_agree_with_the_model(config, tmp_path_factory, tmp_path, run_tool):
    """The second pads images to a multiple of its coarsest stride."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, weights = make_checkpoint(config, tmp_path_factory)
    files = [str(tmp_path / "model.onnx"), str(tmp_path / "model.ts")]
    opts = ["MODEL.WEIGHTS", str(weights), "DATASETS.TEST", "()"]  # the classes are those of DATASETS.TRAIN then
    assert run_tool("tools/export_model.py", "--config-file", config, "--output", *files, "--opts", *opts) == 0
    session = onnxruntime.InferenceSession(files[0], providers=["CPUExecutionProvider"])
    script = torch.jit.load(files[1])
    runs = [lambda x: session.run(None, {"image": x})[0], lambda x: script(torch.from_numpy(x)).detach().numpy()]
    for image in images():
        expected = eager(model, image)
        padded = model.preprocess_image([{"image": image[0]}]).tensor
        raw = F.interpolate(model.outputs(padded).raw_logits, size=padded.shape[-2:], mode="bilinear")
        without = raw[0, :, : image.shape[-2], : image.shape[-1]].detach().numpy()
        assert np.abs(without - expected).max() > 1  # leaving LAM out would show
        for run in runs:
            np.testing.assert_allclose(run(image.numpy())[0], expected, atol=1e-3)

    import onnx

    stored = {p.key: p.value for p in onnx.load(files[0]).metadata_props}
    assert '"background"' in stored["classes"] and stored["image_format"] == "RGB"
    extra = {"classes.txt": ""}
    torch.jit.load(files[1], _extra_files=extra)
    assert b'"background"' in extra["classes.txt"] or '"background"' in extra["classes.txt"]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 7), (13, 8)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_explicit_pooling_is_adaptive_pooling(size, bins):
    x = torch.randn(2, 3, *size)
    with _ExplicitPooling():
        result = F.adaptive_avg_pool2d(x, bins)
    torch.testing.assert_close(result, F.adaptive_avg_pool2d(x, bins))


def test_refusals(checkpoint, tmp_path):
    model, _ = checkpoint
    with pytest.raises(BLPSegError, match="unknown ending"):
        export(model, str(tmp_path / "model.tflite"))
    model.local_aggregation.impl = "window"
    try:
        with pytest.raises(BLPSegError, match="window cannot be exported"):
            InferenceGraph(model)
    finally:
        model.local_aggregation.impl = "auto"


def test_a_graph_that_differs_is_not_written(checkpoint, tmp_path, monkeypatch):
    from blpseg.evaluation import export as module

    def broken(graph, example, metadata):
        graph.model.sem_seg_head.predictor[-1].bias.data += 1
        try:
            return module._export_torchscript(graph, example, metadata)
        finally:
            graph.model.sem_seg_head.predictor[-1].bias.data -= 1

    monkeypatch.setitem(module.EXPORTERS, ".ts", broken)
    with pytest.raises(BLPSegError, match="not written"):
        module.export(checkpoint[0], str(tmp_path / "model.ts"))
    assert not list(tmp_path.iterdir())
