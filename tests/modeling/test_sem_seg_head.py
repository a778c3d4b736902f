"""Heads by config: BLPSeg's on any pyramid, Detectron2's with BLPSeg's parts on their features; earlier weights."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model

from blpseg.modeling.sem_seg_head import build_head
from blpseg.utils.errors import BLPSegError

from .test_model import sample, touched, two_sizes

HEAD = "MODEL.SEM_SEG_HEAD."
DETECTRON2 = {
    "DeepLabV3PlusHead": [HEAD + "IN_FEATURES", ["res2", "res5"], HEAD + "PROJECT_CHANNELS", [8]],
    "SemSegFPNHead": [],
}


@BACKBONE_REGISTRY.register()
class build_odd_backbone(Backbone):  # noqa: N801 (config names a function)
    """Features of odd names and strides, coarsest first, that asks for padding to a square of 96 pixels."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.shapes = {"tail": ShapeSpec(channels=6, stride=48), "stem": ShapeSpec(channels=3, stride=6)}
        self.convs = torch.nn.ModuleDict(
            {k: Conv2d(3, s.channels, s.stride, stride=s.stride) for k, s in self.shapes.items()}
        )

    def forward(self, x):
        self.seen = x.shape[-2:]
        return {name: conv(x) for name, conv in self.convs.items()}

    def output_shape(self):
        return self.shapes

    @property
    def padding_constraints(self):
        return {"square_size": 96}


@pytest.mark.parametrize("lam", [True, False])
@pytest.mark.parametrize("name", DETECTRON2)
def test_detectron2s_heads_train_and_segment(tiny_cfg, name, lam):
    tiny_cfg.merge_from_list([HEAD + "NAME", name, *DETECTRON2[name], "MODEL.BLPSEG.LAM.ENABLED", lam])
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    batch = two_sizes()
    losses = model(batch)
    assert set(losses) == {"loss_seg", "loss_annotation"}
    losses["loss_annotation"].backward(retain_graph=True)
    assert touched(model) == {"annotation_head"}  # on detached features, here too
    losses["loss_seg"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        results = model.eval()(batch)
        padded = model.preprocess_image(batch[:1]).tensor
        features, outputs = model.backbone(padded), model.outputs(padded)
        decoder, predictor = model.sem_seg_head.pixel_decoder.head, model.sem_seg_head.predictor
        decoder.predictor = predictor  # Detectron2's head again, as it was built
        expected = decoder(features)[0]
    assert [tuple(r["sem_seg"].shape) for r in results] == [(5, 64, 90), (5, 50, 47)]
    own = F.interpolate(outputs.raw_logits, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(own, expected)
    assert torch.equal(outputs.raw_logits, outputs.logits) is not lam
    assert outputs.annotation_logits.shape[1] == 6 and (outputs.embedding is None) is not lam


def test_any_pyramid_at_any_common_stride_with_the_padding_that_the_backbone_asks_for(tiny_cfg):
    tiny_cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_odd_backbone"])
    for stride, grid in ((6, 16), (3, 32), (12, 8)):
        tiny_cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = stride
        model = build_model(tiny_cfg).train()
        assert model.sem_seg_head.pixel_decoder.in_features == ["stem", "tail"]
        batch = [sample(64, 90), sample(81, 47, seed=1)]
        assert all(torch.isfinite(x) for x in model(batch).values())
        assert model.backbone.seen == (96, 96)
        with torch.no_grad():
            outputs = model.outputs(model.preprocess_image(batch).tensor)
            assert outputs.logits.shape == (2, 5, grid, grid) and outputs.embedding.shape[2:] == (grid, grid)
            assert [tuple(r["sem_seg"].shape) for r in model.eval()(batch)] == [(5, 64, 90), (5, 81, 47)]


def test_in_features_choose_levels(tiny_cfg):
    tiny_cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res5", "res3"]
    tiny_cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 8
    head = build_model(tiny_cfg).sem_seg_head
    assert head.pixel_decoder.in_features == ["res3", "res5"]
    assert head.local_aggregation.embedding.patch_size == 8


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["IN_FEATURES", ["p2"]], "IN_FEATURES names p2, but the backbone gives res2, res5"),
        (["IGNORE_VALUE", 254], "IGNORE_VALUE is 255"),
        (["LOSS_WEIGHT", 2.0], "LOSS_WEIGHT 2.0: weigh each loss in MODEL.BLPSEG.LOSSES"),
        (["NAME", "UNet"], "'UNet' is unknown; choose among .*BLPSegHead.*SemSegFPNHead"),
        (["NAME", "DeepLabV3PlusHead", "PROJECT_CHANNELS", [8, 8]], "cannot be built: Expected 1 project_channels"),
        (["NAME", "DeepLabV3Head", "IN_FEATURES", ["res5"]], "no features for the annotation head"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(tiny_cfg, opts, message):
    tiny_cfg.merge_from_list([HEAD + x if i % 2 == 0 else x for i, x in enumerate(opts)])
    shape = {"res2": ShapeSpec(channels=4, stride=4), "res5": ShapeSpec(channels=8, stride=32)}
    with pytest.raises(BLPSegError, match=message) as error:
        build_head(tiny_cfg, shape)
    assert "\n" not in str(error.value)


def earlier_name(name):
    """The name of a weight before the head was one module."""
    for new, old in (("local_aggregation.embedding.", "embedding."), ("annotation_head.", "annotation_head."),
                     ("pixel_decoder.", "pixel_decoder."), ("predictor.", "sem_seg_head.")):  # fmt: skip
        if name.startswith("sem_seg_head." + new):
            return old + name.removeprefix("sem_seg_head." + new)
    return name


def test_weights_of_earlier_checkpoints_load_in_their_order(tiny_cfg, tmp_path):
    from blpseg.checkpoint import load_weights

    torch.manual_seed(0)
    state = build_model(tiny_cfg).state_dict()
    earlier = {earlier_name(name): value for name, value in state.items()}
    expected = {"sem_seg_head.0.weight", "annotation_head.4.bias", "embedding.norm.bias", "pixel_decoder.fuse.weight"}
    assert expected < set(earlier)
    torch.save({"model": earlier}, tmp_path / "model.pth")
    plain, by_file, wrapped = build_model(tiny_cfg), build_model(tiny_cfg), torch.nn.Sequential(build_model(tiny_cfg))
    plain.load_state_dict(earlier, strict=True)
    load_weights(by_file, str(tmp_path / "model.pth"), complete=True)
    wrapped.load_state_dict({f"0.{name}": value for name, value in earlier.items()}, strict=True)
    for model in (plain, by_file, wrapped[0]):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # An optimiser's state has numbers for names: the order of the parameters must have stayed.
    tops = [earlier_name(name).split(".")[0] for name, _ in plain.named_parameters()]
    assert list(dict.fromkeys(tops)) == ["backbone", "pixel_decoder", "sem_seg_head", "annotation_head", "embedding"]
