"""tools/convert_checkpoint.py through its door: every layout, what it prints, what it refuses."""

import pickle
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torch import nn

from blpseg import get_cfg
from blpseg.checkpoint import state_dict_of
from blpseg.checkpoint.conversion import convert
from blpseg.utils.errors import BLPSegError


def run_process(root, *args):
    command = [sys.executable, "-W", "ignore", str(root / "tools/convert_checkpoint.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


@pytest.fixture
def run(root, capsys, monkeypatch):
    """The tool in this process, as the command line calls it: another process spends its time on imports."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(root / "tools/convert_checkpoint.py"), run_name="__main__")
        return subprocess.CompletedProcess(args, end.value.code or 0, *capsys.readouterr())

    return run


def model_of(root, classes=21, depth=50, *opts):
    base = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", depth, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", classes]
    return build_model(get_cfg(str(root / "configs/PascalVOC-Scribble/blpseg_R101.yaml"), [*base, *opts]))


@pytest.fixture(scope="module")
def ours(root):
    return model_of(root).state_dict()


@pytest.fixture(scope="module")
def published(ours):
    return convert(ours, "ours.pth").state_dict


def test_published_names(published):
    # A sample of the names METHOD.md's authors use, with their shapes.
    shapes = {k: tuple(v.shape) for k, v in published.items()}
    assert shapes["backbone.conv1.6.weight"] == (128, 64, 3, 3)
    assert shapes["backbone.bn1.running_var"] == (128,)
    assert shapes["backbone.layer2.0.downsample.1.bias"] == (512,)
    assert shapes["ppm.stages.3.2.running_mean"] == (256,)
    assert shapes["decoder.fpn_bottleneck.0.weight"] == (256, 1024, 3, 3)
    assert shapes["scribble_head.4.bias"] == (22,)
    assert shapes["embed_proj.conv.weight"] == (256, 256, 1, 1)
    assert published["CELoss.weight"].tolist() == pytest.approx([1.0] * 21 + [0.02])


def test_the_whole_layout_of_a_published_checkpoint(root, golden):
    import json

    expected = json.loads((golden / "reference_state_dict.json").read_text())
    found = convert(model_of(root, 21, 101).state_dict(), "ours.pth").state_dict
    assert {k: list(v.shape) for k, v in found.items()} == {k: shape for k, (shape, _) in expected.items()}


def test_round_trip(ours, published):
    back = convert(published, "published.pth")
    assert set(back.state_dict) == set(ours)
    assert all(torch.equal(back.state_dict[k], ours[k]) for k in ours)


def test_published_file_with_module_prefix_cached_table_and_wrapper(root, run, tmp_path, published):
    state = {f"module.{k}": v for k, v in published.items()}
    state["module.distance_prob"] = torch.zeros(1, 16, 16)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "in.pth")
    result = run(tmp_path / "in.pth", tmp_path / "out.pth")
    assert result.returncode == 0, result.stderr
    assert "published BLPSeg checkpoint" in result.stdout
    assert f"matched {len(published) - 3} of {len(published) + 1} tensors" in result.stdout
    assert "dropped distance_prob (1, 16, 16): cached distance table" in result.stdout
    assert "dropped CELoss.weight (22,): class weights" in result.stdout
    assert "initial value: nothing" in result.stdout
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    model_of(root).load_state_dict(loaded, strict=True)


def test_other_class_counts(root):
    state = convert(model_of(root, 60).state_dict(), "ours.pth").state_dict
    assert convert(state, "context.pth").config == ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "60"]


class DeepStemResNet(torchvision.models.ResNet):
    """The layout of the well-known resnet50s/101s files: ``conv1`` holds three 3x3 convolutions, then ``bn1``."""

    def __init__(self, layers):
        super().__init__(torchvision.models.resnet.Bottleneck, layers)
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, 1, 1, bias=False),
        )  # fmt: skip
        self.bn1 = nn.BatchNorm2d(128)
        self.layer1 = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, layers).layer1
        self.layer1[0].conv1 = nn.Conv2d(128, 64, 1, bias=False)
        self.layer1[0].downsample[0] = nn.Conv2d(128, 256, 1, bias=False)


def features_of(resnet, x):
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    outputs = []
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        x = layer(x)
        outputs.append(x)
    return outputs


@pytest.mark.parametrize(
    ("name", "make", "opts"),
    [
        ("deep stem, 50 layers", lambda: DeepStemResNet([3, 4, 6, 3]), []),
        ("torchvision, 50 layers", torchvision.models.resnet50,
         ["MODEL.RESNETS.STEM_TYPE", "basic", "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]),
        ("torchvision, 18 layers", torchvision.models.resnet18, None),
    ],
)  # fmt: skip
def test_resnets_compute_what_they_did(root, run, tmp_path, name, make, opts):
    torch.manual_seed(0)
    resnet = make().eval()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    torch.save(resnet.state_dict(), tmp_path / "in.pth")
    result = run(tmp_path / "in.pth", tmp_path / "out.pth")
    assert result.returncode == 0, result.stderr
    assert "dropped fc.weight" in result.stdout and "ImageNet classifier" in result.stdout
    for part in ("annotation_head", "local_aggregation", "pixel_decoder", "predictor"):
        assert part in result.stdout.split("stays at its initial value: ")[1].splitlines()[0]
    if opts is None:
        cfg = get_cfg(str(root / "configs/Base-BLPSeg-R18.yaml"), ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3])
        model = build_model(cfg)
    else:
        model = model_of(root, 3, 50, *opts)
    incompatible = model.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True)["model"], strict=False)
    assert not incompatible.unexpected_keys
    assert not [k for k in incompatible.missing_keys if k.startswith("backbone.")]
    x = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        found, expected = model.eval().backbone(x), features_of(resnet, x)
    for key, value in zip(("res2", "res3", "res4", "res5"), expected, strict=True):
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


def test_detectron2_pickle_of_arrays_is_read(tmp_path):
    resnet = torchvision.models.resnet18()
    arrays = {k: v.numpy() for k, v in resnet.state_dict().items()}
    state = state_dict_of({"model": arrays}, "in.pkl")
    assert convert(state, "in.pkl").source == "torchvision ResNet, 18 layers"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"encoder.weight": torch.zeros(3), "encoder.bias": torch.zeros(3)}, "encoder.weight, encoder.bias"),
        ({}, "no state dict"),
        ({"epoch": 3}, "no tensors"),
        ([1, 2], "expected a mapping"),
    ],
)
def test_what_is_not_recognised_is_refused_in_one_line(run, tmp_path, content, word):
    torch.save(content, tmp_path / "in.pth")
    result = run(tmp_path / "in.pth", tmp_path / "out.pth")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "in.pth" in result.stderr and word in result.stderr
    assert not (tmp_path / "out.pth").exists()


def test_incomplete_files_are_refused(published):
    state = dict(published)
    del state["decoder.fpn_convs.1.0.weight"], state["backbone.layer3.2.bn2.running_mean"]
    with pytest.raises(BLPSegError, match=r"broken\.pth.*2 tensors are missing"):
        convert(state, "broken.pth")


def test_layouts_that_cannot_go_back_say_why(root):
    state = model_of(root, 3, 50, "MODEL.BLPSEG.LAM.ENABLED", False).state_dict()
    with pytest.raises(BLPSegError, match="local aggregation"):
        convert(state, "ours.pth")


def test_nothing_in_the_file_is_run(run, tmp_path):
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for name, write in (
        ("in.pth", lambda f: torch.save({"w": Trap()}, f)),
        ("in.pkl", lambda f: f.write_bytes(pickle.dumps({"w": np.zeros(3), "x": Trap()}))),
    ):
        write(tmp_path / name)
        result = run(tmp_path / name, tmp_path / "out.pth")
        assert result.returncode == 1 and name in result.stderr and "refused" in result.stderr
        assert "Traceback" not in result.stderr
    assert not marker.exists()


def test_the_input_is_not_overwritten(root, tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "in.pth")
    result = run_process(root, tmp_path / "in.pth", tmp_path / "in.pth")
    assert result.returncode == 1 and "give another name" in result.stderr
