"""The parts of the network and the meta-architecture through its doors."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage

from blpseg.modeling.local_aggregation import ShallowEmbedding
from blpseg.modeling.pixel_decoder import PyramidPooling, UPerDecoder
from blpseg.utils.errors import BLPSegError

SHAPES = {f"res{i}": ShapeSpec(channels=8 * i, stride=2**i) for i in range(2, 6)}


def sample(height, width, classes=5, seed=0, annotated=True):
    g = torch.Generator().manual_seed(seed)
    scribble = torch.full((height, width), classes)
    present = torch.zeros(classes, dtype=torch.bool)
    present[0] = True
    if annotated:
        scribble[3:6, 4 : width - 4] = 1
        scribble[10:13, 4:12] = 0
        present[1] = True
    image = torch.randint(256, (3, height, width), generator=g, dtype=torch.uint8)
    return {"image": image, "scribble": scribble, "image_classes": present, "height": height, "width": width}


def two_sizes():
    return [sample(64, 90), sample(50, 47, seed=1)]


def touched(model):
    """Parts of the head (or backbone) that have a gradient."""
    return {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("size", [(64, 96), (111, 143), (37, 50), (33, 200)])
def test_decoder_is_at_the_finest_level_for_any_size(size):
    sizes = {name: tuple(-(-s // spec.stride) for s in size) for name, spec in SHAPES.items()}
    features = {name: torch.randn(2, spec.channels, *sizes[name]) for name, spec in SHAPES.items()}
    decoder = UPerDecoder(SHAPES, channels=16, common_stride=4, pool_scales=[1, 2, 3, 6], norm="BN", dropout=0.1)
    assert decoder(features).shape == (2, 16, *sizes["res2"])


def test_pyramid_pooling_averages_whole_bins():
    # One channel, identity convolutions: with scale 1 the branch is the mean, with scale 2 its corners are bin means.
    module = PyramidPooling(1, 1, [1, 2], norm="", dropout=0.0)
    x = torch.arange(24.0).view(1, 1, 4, 6)
    for branch in module.branches:
        torch.nn.init.ones_(branch.weight)
    weight = module.bottleneck.weight
    for kept, corner in ((0, x.mean()), (1, x[..., :2, :3].mean()), (2, x[..., 0, 0])):
        with torch.no_grad():
            weight.zero_()
            weight[0, kept] = 1
        assert float(module(x)[0, 0, 0, 0].detach()) == pytest.approx(float(corner))


def test_dilated_backbones_feed_the_decoder(tiny_cfg):
    tiny_cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone", "MODEL.RESNETS.DEPTH", 50])
    for res4, res5, stride in ((1, 2, 16), (2, 4, 8)):
        tiny_cfg.merge_from_list(["MODEL.RESNETS.RES4_DILATION", res4, "MODEL.RESNETS.RES5_DILATION", res5])
        model = build_model(tiny_cfg).eval()
        with torch.no_grad():
            features = model.backbone(torch.zeros(1, 3, 64, 64))
            assert features["res5"].shape[-1] == 64 // stride
            assert model([{"image": torch.zeros(3, 64, 64)}])[0]["sem_seg"].shape == (5, 64, 64)
        assert model.sem_seg_head.pixel_decoder.in_features == ["res2", "res3", "res4", "res5"]


def test_embedding_is_a_patch_projection():
    torch.manual_seed(0)
    module = ShallowEmbedding(6).double()
    image = torch.randn(2, 3, 10, 7, dtype=torch.float64)
    found = module(image)
    assert found.shape == (2, 6, 3, 2)
    padded = torch.zeros(2, 3, 12, 8, dtype=torch.float64)
    padded[:, :, :10, :7] = image
    for n, r, c in ((0, 0, 0), (1, 2, 1)):
        patch = padded[n, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
        hidden = (module.patches.weight * patch).sum((1, 2, 3)) + module.patches.bias
        hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-5).sqrt()
        hidden = hidden * module.norm.weight + module.norm.bias
        expected = module.projection.weight[:, :, 0, 0] @ hidden + module.projection.bias
        torch.testing.assert_close(found[n, :, r, c], expected)


def test_training_returns_two_losses_and_gradients_everywhere(tiny_cfg):
    model = build_model(tiny_cfg).train()
    losses = model([sample(64, 64), sample(64, 64, seed=1)])
    assert set(losses) == {"loss_seg", "loss_annotation"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_the_annotation_loss_does_not_shape_the_features(tiny_cfg):
    model = build_model(tiny_cfg).train()
    model([sample(64, 64), sample(64, 64, seed=1)])["loss_annotation"].backward()
    assert touched(model) == {"annotation_head"}


def test_an_image_without_annotation(tiny_cfg):
    model = build_model(tiny_cfg).train()
    losses = model([sample(64, 64, annotated=False), sample(64, 64, seed=1)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("lam", [True, False])
def test_images_of_different_sizes_train_and_are_segmented_at_their_own(tiny_cfg, lam):
    tiny_cfg.MODEL.BLPSEG.LAM.ENABLED = lam
    model = build_model(tiny_cfg)
    batch = [sample(64, 90), sample(81, 47, seed=1)]
    losses = model.train()(batch)
    assert all(torch.isfinite(x) for x in losses.values())
    with torch.no_grad():
        results = model.eval()(batch)
    assert [tuple(r["sem_seg"].shape) for r in results] == [(5, 64, 90), (5, 81, 47)]


def test_padding_beside_a_smaller_image_is_no_supervision(tiny_cfg):
    """The labels of a padded batch are 255 outside; a model without batch norm sees the same annotation loss count."""
    model = build_model(tiny_cfg)
    batch = [sample(64, 90), sample(40, 47, seed=1)]
    images = model.preprocess_image(batch)
    scribble, _ = model._labels(batch, images.tensor)
    assert scribble.shape == (2, 64, 90)
    assert (scribble[1, 40:] == 255).all() and (scribble[1, :, 47:] == 255).all()
    assert torch.equal(scribble[1, :40, :47], batch[1]["scribble"])
    assert (images.tensor[1, :, 40:] == 0).all()


def test_result_is_resized_to_the_wanted_size(tiny_cfg):
    model = build_model(tiny_cfg).eval()
    image = sample(64, 64)["image"]
    with torch.no_grad():
        own = model([{"image": image}])[0]["sem_seg"]
        wanted = model([{"image": image, "height": 100, "width": 50}])[0]["sem_seg"]
    assert own.shape == (5, 64, 64)
    torch.testing.assert_close(wanted, F.interpolate(own[None], (100, 50), mode="bilinear", align_corners=False)[0])


def test_self_training_starts_at_its_iteration_and_can_be_off(tiny_cfg):
    tiny_cfg.MODEL.BLPSEG.SELF_TRAINING.START_ITER = 7
    model = build_model(tiny_cfg)
    for iteration, expected in ((0, False), (6, False), (7, True), (8, True)):
        with EventStorage(iteration):
            assert model.self_training is expected
    tiny_cfg.MODEL.BLPSEG.SELF_TRAINING.ENABLED = False
    with EventStorage(100):
        assert not build_model(tiny_cfg).self_training


def test_all_off_is_plain_partial_cross_entropy(tiny_cfg):
    for part in ("BLP", "LAM", "SELF_TRAINING"):
        tiny_cfg.MODEL.BLPSEG[part].ENABLED = False
    tiny_cfg.MODEL.BLPSEG.DECODER.DROPOUT = 0.0
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    assert not any("embedding" in name for name, _ in model.named_parameters())
    batch = [sample(64, 64), sample(64, 64, seed=1)]
    loss = model(batch)["loss_seg"]
    images = model.preprocess_image(batch).tensor
    logits = model.sem_seg_head.predictor(model.sem_seg_head.pixel_decoder(model.backbone(images)))
    logits = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    target = torch.stack([torch.where(b["scribble"] < 5, b["scribble"], 255) for b in batch])
    expected = sum(F.cross_entropy(x[None], t[None], ignore_index=255) for x, t in zip(logits, target, strict=True)) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_scalars_for_the_log(tiny_cfg):
    model = build_model(tiny_cfg).train()
    with EventStorage(0) as storage:
        model([sample(64, 64), sample(64, 64, seed=1)])
        scalars = {k: v[0] for k, v in storage.latest().items()}
    annotated = (3 * 56 + 3 * 8) / 64**2
    assert scalars["blpseg/annotated_share"] == pytest.approx(annotated)
    assert scalars["blpseg/supervised_share"] == pytest.approx(annotated)
    assert 0 < scalars["blpseg/blp_weight"] <= 1


def test_inspect_shows_what_the_losses_use(tiny_cfg):
    torch.manual_seed(0)
    model = build_model(tiny_cfg).eval()
    batch = [sample(64, 90), sample(40, 47, seed=1)]
    for seen, x in zip(model.inspect(batch), batch, strict=True):
        height, width = x["scribble"].shape
        assert seen["sem_seg"].shape == (5, height, width)
        assert seen["annotation_prob"].shape == (6, height, width)
        torch.testing.assert_close(seen["annotation_prob"].sum(0), torch.ones(height, width))
        annotated = x["scribble"] < 5
        assert torch.equal(seen["blp_weight"] > 0, annotated)
        assert torch.equal(seen["pseudo_label"][annotated], x["scribble"][annotated])
        p = seen["sem_seg"].softmax(0)[1, 4, 20]
        expected = (1 - p * seen["annotation_prob"][1, 4, 20]) ** 2
        torch.testing.assert_close(seen["blp_weight"][4, 20], expected)
    assert set(model.inspect([{"image": batch[0]["image"]}])[0]) == {"sem_seg", "annotation_prob"}


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_mixed_precision_trains_without_inf_or_nan(tiny_cfg, dtype):
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    with torch.no_grad():
        model.local_aggregation.embedding.projection.weight.mul_(30)  # dot products of thousands
        model.sem_seg_head.predictor[-1].weight.mul_(30)
    with torch.autocast("cpu", dtype=dtype):
        losses = model([sample(64, 64), sample(64, 64, seed=1)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) and x.dtype == torch.float32 for x in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.gpu
def test_fp16_on_a_gpu(tiny_cfg):
    tiny_cfg.MODEL.DEVICE = "cuda"
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    batch = [sample(64, 64), sample(64, 64, seed=1)]
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(12):  # each step that overflows halves the scale of 65,536
        with torch.autocast("cuda", dtype=torch.float16):
            losses = model(batch)
        assert all(torch.isfinite(x) and x.dtype == torch.float32 for x in losses.values())
        optimizer.zero_grad()
        scaler.scale(sum(losses.values())).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("depth", [18, 34])
def test_plain_resnets_for_small_machines(tiny_cfg, depth):
    tiny_cfg.MODEL.RESNETS.DEPTH = depth
    model = build_model(tiny_cfg).eval()
    with torch.no_grad():
        assert model([sample(48, 48)])[0]["sem_seg"].shape == (5, 48, 48)


def test_initial_values(tiny_cfg):
    model = build_model(tiny_cfg)
    weight = model.sem_seg_head.pixel_decoder.fuse.weight
    fan_out = weight.shape[0] * 9
    assert float(weight.std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    norm = model.sem_seg_head.pixel_decoder.fuse.norm
    assert (norm.weight == 1).all() and (norm.bias == 0).all()
    assert (model.sem_seg_head.predictor[-1].bias == 0).all()


@pytest.mark.parametrize("depth", [18, 34])
def test_narrow_resnet_at_64_channels_is_detectron2s(tiny_cfg, depth):
    tiny_cfg.MODEL.RESNETS.DEPTH = depth
    reference = build_backbone(tiny_cfg).eval()
    tiny_cfg.MODEL.BACKBONE.NAME = "build_narrow_resnet_backbone"
    narrow = build_backbone(tiny_cfg).eval()
    narrow.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 70, 64)
    with torch.no_grad():
        expected, found = reference(x), narrow(x)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


def test_narrow_resnet_has_the_width_asked_for(tiny_cfg):
    tiny_cfg.MODEL.BACKBONE.NAME = "build_narrow_resnet_backbone"
    tiny_cfg.merge_from_list(["MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8])
    shapes = build_backbone(tiny_cfg).output_shape()
    assert [(s.channels, s.stride) for s in shapes.values()] == [(8, 4), (16, 8), (32, 16), (64, 32)]
    tiny_cfg.MODEL.RESNETS.DEPTH = 50
    with pytest.raises(BLPSegError, match="18 or 34"):
        build_backbone(tiny_cfg)


NARROW_50 = [
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone"),
]


@pytest.mark.parametrize(
    ("opts", "word"),
    [
        (["MODEL.RESNETS.OUT_FEATURES", ["res9"]], "Available children"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", 32], "RES2_OUT_CHANNELS = 64"),
        (["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [True] * 4], "unsupported for R18"),
        (["MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 48], "num_groups"),
        ([*NARROW_50, "MODEL.RESNETS.RES5_DILATION", 3], "res5_dilation cannot be 3"),
        ([*NARROW_50, "MODEL.RESNETS.RES5_MULTI_GRID", [1, 1]], "num_blocks=3"),
        ([*NARROW_50, "MODEL.RESNETS.RES5_MULTI_GRID", ["a", "b", "c"]], "padding"),
    ],
)
def test_a_backbone_that_cannot_be_built_is_one_line(tiny_cfg, opts, word):
    tiny_cfg.merge_from_list(opts)
    with pytest.raises(BLPSegError, match=f"MODEL.BACKBONE.NAME build_.* cannot be built, .*{word}") as error:
        build_model(tiny_cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("opts", "word"),
    [
        (
            ["MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.SWIN.NUM_HEADS", [5, 5, 5, 5]],
            "5 heads .* 96 channels",
        ),
        (["MODEL.BACKBONE.NAME", "build_vit_backbone", "MODEL.VIT.EMBED_DIM", 33], "12 heads .* 33 channels"),
    ],
)
def test_heads_that_cannot_share_the_channels_are_one_line(tiny_cfg, opts, word):
    tiny_cfg.merge_from_list(opts)
    with pytest.raises(BLPSegError, match=word):
        build_model(tiny_cfg)
