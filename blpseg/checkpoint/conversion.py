"""Converting weights: published and ResNet layouts to ours, and ours to the published. The content decides which."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..utils.errors import BLPSegError
from ..utils.state_dict import current_name

# Published layout <-> ours, as (published prefix, our prefix). {0} and {1} are numbers.
_BACKBONE = tuple(
    (f"layer{stage}.{{0}}.{theirs}", f"res{stage + 1}.{{0}}.{ours}")
    for stage in range(1, 5)
    for theirs, ours in (
        *(("conv{1}", "conv{1}"), ("bn{1}", "conv{1}.norm")),
        *(("downsample.0", "shortcut"), ("downsample.1", "shortcut.norm")),
    )
)
_DEEP_STEM = (
    ("conv1.0", "stem.conv1"),
    ("conv1.1", "stem.conv1.norm"),
    ("conv1.3", "stem.conv2"),
    ("conv1.4", "stem.conv2.norm"),
    ("conv1.6", "stem.conv3"),
    ("bn1", "stem.conv3.norm"),
)
_PLAIN_STEM = (("conv1", "stem.conv1"), ("bn1", "stem.conv1.norm"))
_REST = (
    ("ppm.stages.{0}.1", "sem_seg_head.pixel_decoder.pyramid_pooling.branches.{0}"),
    ("ppm.stages.{0}.2", "sem_seg_head.pixel_decoder.pyramid_pooling.branches.{0}.norm"),
    ("ppm.bottleneck.0", "sem_seg_head.pixel_decoder.pyramid_pooling.bottleneck"),
    ("ppm.bottleneck.1", "sem_seg_head.pixel_decoder.pyramid_pooling.bottleneck.norm"),
    ("decoder.lateral_convs.{0}.0", "sem_seg_head.pixel_decoder.lateral_convs.{0}"),
    ("decoder.lateral_convs.{0}.1", "sem_seg_head.pixel_decoder.lateral_convs.{0}.norm"),
    ("decoder.fpn_convs.{0}.0", "sem_seg_head.pixel_decoder.output_convs.{0}"),
    ("decoder.fpn_convs.{0}.1", "sem_seg_head.pixel_decoder.output_convs.{0}.norm"),
    ("decoder.fpn_bottleneck.0", "sem_seg_head.pixel_decoder.fuse"),
    ("decoder.fpn_bottleneck.1", "sem_seg_head.pixel_decoder.fuse.norm"),
    ("seg_head.{0}", "sem_seg_head.predictor.{0}"),
    ("scribble_head.{0}", "sem_seg_head.annotation_head.{0}"),
    ("embed_proj.proj", "sem_seg_head.local_aggregation.embedding.patches"),
    ("embed_proj.norm", "sem_seg_head.local_aggregation.embedding.norm"),
    ("embed_proj.conv", "sem_seg_head.local_aggregation.embedding.projection"),
)


def _with_prefix(rules, published: str, ours: str):
    return tuple((published + a, ours + b) for a, b in rules)


_BLPSEG = _with_prefix(_DEEP_STEM + _BACKBONE, "backbone.", "backbone.") + _REST

_TENSOR = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def _renamer(rules) -> Callable[[str], str | None]:
    """A function from a source key to the target key, None where no rule fits."""
    compiled = []
    for source, target in rules:
        pattern = re.escape(source)
        for number in "01":
            pattern = pattern.replace(re.escape("{" + number + "}"), rf"(?P<n{number}>\d+)")
        compiled.append((re.compile(rf"{pattern}\.{_TENSOR}"), target))

    def rename(key: str) -> str | None:
        for pattern, target in compiled:
            match = pattern.fullmatch(key)
            if match:
                numbers = match.groupdict()
                return target.format(numbers.get("n0"), numbers.get("n1")) + "." + match.groups()[-1]
        return None

    return rename


@dataclass
class Conversion:
    """The result of :func:`convert`: the layout that was recognised and the converted tensors.

    Attributes:
        dropped: (key, reason) of every tensor left out.
        initial: prefixes of our model's parts that the file does not fill.
        config: ``KEY VALUE`` pairs under which the weights fit, for the user to read.
    """

    source: str
    state_dict: dict[str, torch.Tensor]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    initial: list[str] = field(default_factory=list)
    config: list[str] = field(default_factory=list)


def convert(state: Mapping[str, torch.Tensor], file: str, unannotated_weight: float = 0.02) -> Conversion:
    """Convert a state dict to the other layout: published, ResNet -> ours; ours -> published.

    Args:
        state: name -> tensor, as :func:`blpseg.checkpoint.state_dict_of` returns it.
        file: its name, for messages.
        unannotated_weight: last entry of the ``CELoss.weight`` that the published layout carries.

    Raises:
        BLPSegError: the layout is none of these, or some of its tensors are missing.
    """
    if "seg_head.4.weight" in state and "backbone.conv1.0.weight" in state:
        return _published_to_ours(state, file)
    state = {current_name(key): value for key, value in state.items()}
    if "sem_seg_head.predictor.4.weight" in state and "backbone.stem.conv1.weight" in state:
        return _ours_to_published(state, file, unannotated_weight)
    if "conv1.0.weight" in state and "layer4.0.conv1.weight" in state:
        return _resnet(state, file, "ResNet with a deep stem", _DEEP_STEM, "deeplab")
    if "conv1.weight" in state and "layer4.0.conv1.weight" in state:
        return _resnet(state, file, "torchvision ResNet", _PLAIN_STEM, "basic")
    raise BLPSegError(
        f"{file}: not recognised as a BLPSeg checkpoint (published or ours) nor as a ResNet of torchvision's or "
        f"the deep-stem layout; first keys: {', '.join(list(state)[:5])}"
    )


def _published_to_ours(state, file: str) -> Conversion:
    result = Conversion("published BLPSeg checkpoint", {})
    known = {
        "distance_prob": "cached distance table, computed when needed",
        "CELoss.weight": "class weights of the annotation loss, set by the config",
        "backbone.layernorm.weight": "the published network does not use it",
        "backbone.layernorm.bias": "the published network does not use it",
    }
    _rename_all(state, _renamer(_BLPSEG), known, result)
    num_classes = _length(state, "seg_head.4.weight", file)
    _require(result, file, _expected_resnet(result.state_dict, "backbone.") + _our_parts())
    result.config = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(num_classes)]
    return result


def _ours_to_published(state, file: str, unannotated_weight: float) -> Conversion:
    if "backbone.stem.conv3.weight" not in state:
        raise BLPSegError(f"{file}: the published layout needs a deep stem (MODEL.RESNETS.STEM_TYPE deeplab)")
    if "sem_seg_head.local_aggregation.embedding.patches.weight" not in state:
        raise BLPSegError(f"{file}: the published layout needs local aggregation (MODEL.BLPSEG.LAM.ENABLED True)")
    if "sem_seg_head.annotation_head.4.weight" not in state:
        raise BLPSegError(f"{file}: the published layout needs MODEL.BLPSEG.ANNOTATION.PLACE False")
    result = Conversion("BLPSeg checkpoint of this project, to the published layout", {})
    _rename_all(state, _renamer([(ours, published) for published, ours in _BLPSEG]), {}, result)
    # Further entries of the published layout, without which a strict load refuses the file.
    weight = torch.ones(_length(state, "sem_seg_head.annotation_head.4.weight", file))
    weight[-1] = unannotated_weight
    stem_channels = _length(state, "backbone.stem.conv3.weight", file)
    result.state_dict |= {
        "backbone.layernorm.weight": torch.ones(stem_channels),
        "backbone.layernorm.bias": torch.zeros(stem_channels),
        "CELoss.weight": weight,
    }
    return result


def _resnet(state, file: str, name: str, stem, stem_type: str) -> Conversion:
    depth = _depth(state)
    if depth is None:
        raise BLPSegError(f"{file}: a ResNet of unknown depth; known are 18, 34, 50, 101 and 152")
    result = Conversion(f"{name}, {depth} layers", {})
    known = {"fc.weight": "ImageNet classifier", "fc.bias": "ImageNet classifier"}
    _rename_all(state, _renamer(_with_prefix(stem + _BACKBONE, "", "backbone.")), known, result)
    _require(result, file, _expected_resnet(result.state_dict, "backbone."))
    result.initial = sorted({key.split(".")[1] for key in _our_parts()})
    result.config = ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.STEM_TYPE", stem_type]
    result.config += ["MODEL.RESNETS.STEM_OUT_CHANNELS", str(_length(state, "bn1.weight", file))]
    result.config += ["MODEL.RESNETS.STRIDE_IN_1X1", "False"]
    if depth < 50:
        result.config += ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    return result


def _rename_all(state, rename, known: Mapping[str, str], result: Conversion) -> None:
    for key, value in state.items():
        target = rename(key)
        if target is not None:
            result.state_dict[target] = value
        else:
            result.dropped.append((key, known.get(key, "no counterpart")))


def _length(state, key: str, file: str) -> int:
    if key not in state or not state[key].dim():
        raise BLPSegError(f"{file}: {key} is missing or a single number, so that it is no layer's weights")
    return len(state[key])


def _depth(state) -> int | None:
    found = (re.match(r"layer([1-4])\.(\d+)\.", key) for key in state)
    blocks = {m.groups() for m in found if m}
    counts = tuple(sum(stage == i for stage, _ in blocks) for i in "1234")
    if "layer1.0.conv3.weight" in state:
        return {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}.get(counts)
    return {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}.get(counts)


def _expected_resnet(converted, prefix: str) -> list[str]:
    """Keys that a complete ResNet must have, judged from the blocks that are there."""
    keys = []
    for stage in range(2, 6):
        blocks = {m.group(1) for m in (re.match(rf"{prefix}res{stage}\.(\d+)\.", k) for k in converted) if m}
        convs = (1, 2, 3) if any(f"{prefix}res{stage}.0.conv3." in k for k in converted) else (1, 2)
        for block in range(len(blocks)):
            for conv in convs:
                keys += _conv_and_norm(f"{prefix}res{stage}.{block}.conv{conv}")
    stem = range(1, 4) if f"{prefix}stem.conv2.weight" in converted else (1,)
    return keys + [key for conv in stem for key in _conv_and_norm(f"{prefix}stem.conv{conv}")]


def _conv_and_norm(name: str) -> list[str]:
    return [f"{name}.weight", *(f"{name}.norm.{x}" for x in ("weight", "bias", "running_mean", "running_var"))]


def _our_parts() -> list[str]:
    keys = []
    for _, ours in _REST:
        numbers = {"branches": range(4), "convs": range(3), "(predictor|annotation_head)": (0, 2, 4)}
        indices = next((v for name, v in numbers.items() if re.search(rf"{name}\.\{{0\}}", ours)), (None,))
        for i in indices:
            part = ours.format(i)
            keys.append(f"{part}.weight")
            if part.endswith((".norm", "predictor.4", "head.4")) or ".embedding." in part:
                keys.append(f"{part}.bias")
            if part.endswith(".norm") and ".embedding." not in part:
                keys += [f"{part}.running_mean", f"{part}.running_var"]
    return keys


def _require(result: Conversion, file: str, keys: list[str]) -> None:
    missing = [key for key in keys if key not in result.state_dict]
    if missing:
        raise BLPSegError(
            f"{file}: looks like a {result.source} but {len(missing)} tensors are missing, "
            f"e.g. {', '.join(missing[:3])}; the file is incomplete or of another version"
        )
