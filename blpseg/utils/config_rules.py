"""Tables of the values that config keys may have, and of the keys of Detectron2 that BLPSeg does not read."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from .errors import BLPSegError

logger = logging.getLogger(__name__)

_NORMS = ["", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"]

# Keys that name one of several things. A script that adds one of its own appends its name here:
# CHOICES["SOLVER.LR_SCHEDULER_NAME"].append("MySchedule").
CHOICES: dict[str, list[str]] = {
    "DATASETS.FOLDER.EVALUATOR": ["sem_seg", "sem_seg_volume"],
    "INPUT.CROP.TYPE": ["absolute", "relative", "relative_range", "absolute_range"],
    "INPUT.FORMAT": ["RGB", "BGR"],
    "INPUT.RANDOM_FLIP": ["none", "horizontal", "vertical"],
    "INPUT.SUPERVISION": ["scribble", "dense"],
    "MODEL.RESNETS.NORM": _NORMS,
    "MODEL.RESNETS.STEM_TYPE": ["basic", "deeplab"],
    "MODEL.SEM_SEG_HEAD.NORM": _NORMS,
    "SOLVER.AMP.DTYPE": ["float16", "bfloat16"],
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ["value", "norm", "full_model"],
    "SOLVER.LR_SCHEDULER_NAME": ["WarmupPolyLR", "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"],
    "SOLVER.OPTIMIZER": ["AdamW", "SGD"],
    "SOLVER.WARMUP_METHOD": ["linear", "constant"],
}


class Rule(NamedTuple):
    """The condition on a value, in words and as a function."""

    allowed: str
    holds: Callable[[object], bool]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _within(low: float, high: float = math.inf) -> Rule:
    """A number from ``low`` to ``high``, both included."""
    allowed = f"from {low} to {high}" if high < math.inf else f"{low} or more"
    return Rule(f"a number, {allowed}", lambda v: _is_number(v) and low <= v <= high)  # type: ignore[operator]


def _whole(low: int, high: int) -> Rule:
    """A whole number from ``low`` to ``high``, both included, also within a list."""
    return Rule(
        f"a whole number, from {low} to {high}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
    )


def _each(rule: Rule, least: int, most: int | None = None) -> Rule:
    """A list of ``least`` to ``most`` (None: any number of) values that hold to ``rule``."""
    count = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
    return Rule(
        f"a list of {count} values, each {rule.allowed}",
        lambda v: isinstance(v, (list, tuple)) and least <= len(v) <= (most or len(v)) and all(map(rule.holds, v)),
    )


_POSITIVE = Rule("a number above 0", lambda v: _is_number(v) and v > 0)  # type: ignore[operator]
_TEXT = Rule("text", lambda v: isinstance(v, str))
_WORKERS = _within(0, 1024)
_DECAY = Rule("None, or a number, 0 or more", lambda v: v is None or _within(0).holds(v))
_DEVICE = Rule("auto, cpu, cuda, cuda:N or mps", lambda v: bool(re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|mps", str(v))))
_CHANNELS = _within(1, 65536)

# A key of whole numbers is an integer already (the config's own types); these are its bounds.
RULES: dict[str, Rule] = {
    "DATALOADER.NUM_WORKERS": _WORKERS,
    "DATASETS.FOLDER.CLASSES": _each(_TEXT, 0, 254),
    "DATASETS.FOLDER.IGNORE_LABEL": _within(0, 255),
    "DATASETS.HOLD_OUT": _within(0, 0.9),
    "DATASETS.TEST": _each(_TEXT, 0),
    "DATASETS.TRAIN": _each(_TEXT, 0),
    "INPUT.COLOR_JITTER.BRIGHTNESS": _within(0, 1),
    "INPUT.COLOR_JITTER.CONTRAST": _within(0, 1),
    "INPUT.COLOR_JITTER.HUE": _within(0, 0.5),
    "INPUT.COLOR_JITTER.SATURATION": _within(0, 1),
    "INPUT.CROP.SIZE": _each(_within(0.01, 65536), 2, 2),  # Detectron2's default is a share of the image
    "INPUT.LONGEST_SIDE": _within(0),
    "INPUT.ROTATION_DEGREES": _within(0, 180),
    "INPUT.SCALE_RANGE": _each(_within(0.01, 16), 2, 2),
    "MODEL.BACKBONE.FREEZE_AT": _within(0, 5),
    "MODEL.BLPSEG.ANNOTATION.LR_FACTOR": _POSITIVE,
    "MODEL.BLPSEG.ANNOTATION.UNANNOTATED_WEIGHT": _within(0),
    "MODEL.BLPSEG.BLP.GAMMA": _within(0),
    "MODEL.BLPSEG.DECODER.DROPOUT": _within(0, 1),
    "MODEL.BLPSEG.DECODER.POOL_SCALES": _each(_whole(1, 1024), 1),
    "MODEL.BLPSEG.DENSE_CRF.MAX_POSITIONS": _within(1),
    "MODEL.BLPSEG.DENSE_CRF.SIGMA_RGB": _POSITIVE,
    "MODEL.BLPSEG.DENSE_CRF.SIGMA_XY": _POSITIVE,
    "MODEL.BLPSEG.GATED_CRF.RADIUS": _within(1, 1024),
    "MODEL.BLPSEG.GATED_CRF.SIGMA_RGB": _POSITIVE,
    "MODEL.BLPSEG.GATED_CRF.SIGMA_XY": _POSITIVE,
    "MODEL.BLPSEG.HEAD_CHANNELS": _CHANNELS,
    "MODEL.BLPSEG.MEAN_TEACHER.DECAY": _within(0, 1),
    "MODEL.BLPSEG.MEAN_TEACHER.RAMP_ITERS": _within(0),
    "MODEL.BLPSEG.SOFT_SELF_LABELLING.POTTS_WEIGHT": _within(0),
    "MODEL.BLPSEG.SOFT_SELF_LABELLING.SIGMA_RGB": _POSITIVE,
    "MODEL.BLPSEG.SOFT_SELF_LABELLING.STEPS": _within(1, 1000),
    "MODEL.BLPSEG.SOFT_SELF_LABELLING.STEP_SIZE": _POSITIVE,
    "MODEL.BLPSEG.TREE_ENERGY.SIGMA": _POSITIVE,
    "MODEL.BLPSEG.LAM.EMBEDDING_CHANNELS": _CHANNELS,
    "MODEL.BLPSEG.LAM.SIGMA": _POSITIVE,
    "MODEL.BLPSEG.LAM.WINDOW": _POSITIVE,
    "MODEL.BLPSEG.SELF_TRAINING.START_ITER": _within(0),
    "MODEL.BLPSEG.SELF_TRAINING.THRESHOLD": _within(0, 1),
    "MODEL.DEVICE": _DEVICE,
    "MODEL.FPN.OUT_CHANNELS": _CHANNELS,
    "MODEL.PIXEL_MEAN": _each(_within(-1e6, 1e6), 3, 3),
    "MODEL.PIXEL_STD": _each(_POSITIVE, 3, 3),
    "MODEL.RESNETS.DEPTH": Rule("18, 34, 50, 101 or 152", lambda v: v in (18, 34, 50, 101, 152)),
    "MODEL.RESNETS.NUM_GROUPS": _CHANNELS,
    "MODEL.RESNETS.OUT_FEATURES": _each(_TEXT, 1),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.RES4_DILATION": _within(1, 64),
    "MODEL.RESNETS.RES5_DILATION": _within(1, 64),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _CHANNELS,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": _within(1, 64),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": _CHANNELS,
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": _each(_TEXT, 0),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": _within(1, 254),
    "MODEL.SWIN.DEPTHS": _each(_whole(1, 1024), 4, 4),
    "MODEL.SWIN.DROP_PATH_RATE": _within(0, 1),
    "MODEL.SWIN.EMBED_DIM": _CHANNELS,
    "MODEL.SWIN.NUM_HEADS": _each(_whole(1, 1024), 4, 4),
    "MODEL.SWIN.WINDOW_SIZE": _within(1, 1024),
    "MODEL.TIMM.OUTPUT_STRIDE": Rule("8, 16 or 32", lambda v: v in (8, 16, 32)),
    "MODEL.VIT.DEPTH": _within(1, 1024),
    "MODEL.VIT.DROP_PATH_RATE": _within(0, 1),
    "MODEL.VIT.EMBED_DIM": _CHANNELS,
    "MODEL.VIT.IMG_SIZE": _within(1, 65536),
    "MODEL.VIT.NUM_HEADS": _within(1, 1024),
    "MODEL.VIT.PATCH_SIZE": _within(1, 1024),
    "MODEL.VIT.SQUARE_PAD": _within(0, 65536),
    "MODEL.VIT.WINDOW_BLOCK_INDEXES": _each(_whole(0, 1023), 0),
    "OUTPUT_DIR": Rule("a folder on this machine", lambda v: isinstance(v, str) and "://" not in v),
    "OUTPUT.KEEP_CHECKPOINTS": _within(1),
    "OUTPUT.LOG_PERIOD": _within(1),
    "OUTPUT.PANEL_IMAGES": _within(0, 64),
    "OUTPUT.PANEL_PERIOD": _within(0),
    "SEED": _within(-1, 2**32 - 1),
    "SOLVER.ACCUMULATION_STEPS": _within(1),
    "SOLVER.BACKBONE_MULTIPLIER": _POSITIVE,
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.BASE_LR_END": _within(0),
    "SOLVER.BIAS_LR_FACTOR": _POSITIVE,
    "SOLVER.CHECKPOINT_PERIOD": _within(1),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _POSITIVE,
    "SOLVER.IMS_PER_BATCH": _within(1),
    "SOLVER.MAX_ITER": _within(1),
    "SOLVER.MOMENTUM": _within(0, 1),
    "SOLVER.NUM_DECAYS": _within(1),
    "SOLVER.POLY_LR_CONSTANT_ENDING": _within(0),
    "SOLVER.POLY_LR_POWER": _within(0),
    "SOLVER.STEPS": _each(_whole(0, 2**62), 0),
    "SOLVER.WARMUP_FACTOR": _within(0),
    "SOLVER.WARMUP_ITERS": _within(0),
    "SOLVER.WEIGHT_DECAY": _within(0),
    "SOLVER.WEIGHT_DECAY_BIAS": _DECAY,
    "SOLVER.WEIGHT_DECAY_NORM": _DECAY,
    "TEST.AUG.SCALES": _each(_within(0.01, 16), 1, 64),
    "TEST.CRF.ITERATIONS": _within(1, 1000),
    "TEST.CRF.NUM_WORKERS": _WORKERS,
    "TEST.EVAL_PERIOD": _within(0),
    "TEST.REPORT.PANELS": _within(0),
    "TEST.TILE.ABOVE": _within(0),
    "TEST.TILE.OVERLAP": _within(0),
    "TEST.TILE.SIZE": _within(32),
    **{f"TEST.CRF.{name}": _POSITIVE for name in ("GAUSSIAN_SXY", "BILATERAL_SXY", "BILATERAL_SRGB")},
    **{f"TEST.CRF.{name}_COMPAT": _within(0) for name in ("GAUSSIAN", "BILATERAL")},
}

# Keys that nothing reads while MODEL.META_ARCHITECTURE is BLPSeg, as (key, what to do instead). A user of Detectron2
# may expect an effect. tests/test_config_keys.py finds what a run reads and compares.
_DETECTION = "it is for detection; remove it"
_SCALES = "set INPUT.SCALE_RANGE and INPUT.CROP.SIZE for training; images are tested at their own size"
UNREAD: list[tuple[str, str]] = [
    (r"MODEL\.(LOAD_PROPOSALS|MASK_ON|KEYPOINT_ON)", _DETECTION),
    (r"MODEL\.(PROPOSAL_GENERATOR|ANCHOR_GENERATOR|RPN|ROI_\w+|PANOPTIC_FPN|RETINANET)\..*", _DETECTION),
    (r"INPUT\.(MIN|MAX)_SIZE_\w+", _SCALES),
    (r"INPUT\.MASK_FORMAT", _DETECTION),
    (r"INPUT\.CROP\.SINGLE_CATEGORY_MAX_AREA", "crops are placed at random"),
    (r"DATASETS\.(PROPOSAL_FILES|PRECOMPUTED_PROPOSAL)_\w+", _DETECTION),
    (r"DATALOADER\.(ASPECT_RATIO_GROUPING|FILTER_EMPTY_ANNOTATIONS)", _DETECTION),
    (r"DATALOADER\.(SAMPLER_TRAIN|REPEAT_\w+)", "every image is drawn equally often"),
    (r"SOLVER\.REFERENCE_WORLD_SIZE", "set SOLVER.IMS_PER_BATCH and SOLVER.BASE_LR for the number of processes"),
    (r"TEST\.AUG\.(MIN_SIZES|MAX_SIZE)", "set TEST.AUG.SCALES, factors of the image's size"),
    (r"TEST\.(EXPECTED_RESULTS|PRECISE_BN\..*)", "remove it"),
    (r"TEST\.(KEYPOINT_OKS_SIGMAS|DETECTIONS_PER_IMAGE)", _DETECTION),
    (r"VIS_PERIOD", "set OUTPUT.PANEL_PERIOD"),
    (r"GLOBAL\.HACK", "remove it"),
]

# The same for keys that only some of the parts read, by the key and the pattern of the part that does.
UNREAD_BY_PART: list[tuple[str, str, str]] = [
    (
        r"MODEL\.SEM_SEG_HEAD\.(LOSS_TYPE|PROJECT_\w+|ASPP_\w+|USE_DEPTHWISE_SEPARABLE_CONV)",
        *("MODEL.SEM_SEG_HEAD.NAME", r"(?!BLPSegHead$|SemSegFPNHead$).*"),
    ),
    (r"MODEL\.TIMM\..*", "MODEL.BACKBONE.NAME", r"(?!build_(resnet|narrow|swin|vit)_).*"),
    (r"MODEL\.SWIN\..*", "MODEL.BACKBONE.NAME", r"(?!build_(resnet|narrow|timm|vit)_).*"),
    (r"MODEL\.VIT\..*", "MODEL.BACKBONE.NAME", r"(?!build_(resnet|narrow|timm|swin)_).*"),
    (r"MODEL\.FPN\..*", "MODEL.BACKBONE.NAME", r"(?!build_resnet_backbone$|build_resnet_deeplab_backbone$).*"),
]

# Names that need no look into Detectron2's registries, whose import takes seconds.
_BUILT_IN = {
    "MODEL.META_ARCHITECTURE": {"BLPSeg", "GeneralizedRCNN", "SemanticSegmentor"},
    "MODEL.BACKBONE.NAME": {"build_resnet_backbone", "build_resnet_deeplab_backbone", "build_resnet_fpn_backbone"},
    "MODEL.SEM_SEG_HEAD.NAME": {"BLPSegHead", "SemSegFPNHead"},
}
# Other models and mappers than ours may take more.
_ONLY_OURS = {
    *("INPUT.CROP.TYPE", "INPUT.FORMAT", "INPUT.RANDOM_FLIP", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
    *("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.OUT_FEATURES"),
}


def check_values(values: dict[str, object], defaults: dict[str, object]) -> None:
    """Raise BLPSegError for the first of the values, by dotted key, that is not allowed; it names the allowed ones."""
    ours = values.get("MODEL.META_ARCHITECTURE") == "BLPSeg"
    for key, value in values.items():
        if key in _ONLY_OURS and not ours:
            continue
        if value is None and defaults.get(key) is not None and key not in RULES:
            raise _not_allowed(key, value, f"a value such as {defaults[key]!r}")
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(v, float) and not math.isfinite(v) for v in numbers):
            raise _not_allowed(key, value, "finite numbers")
        if isinstance(value, str) and "\0" in value:  # which no path may have
            raise _not_allowed(key, value, "text without NUL")
        if key in CHOICES and value not in CHOICES[key]:
            raise _not_allowed(key, value, _listed(CHOICES[key]))
        if key in RULES and not RULES[key].holds(value):
            raise _not_allowed(key, value, RULES[key].allowed)
    scales = values.get("INPUT.SCALE_RANGE", (1, 1))
    if scales[0] > scales[1]:  # type: ignore[index]
        raise _not_allowed("INPUT.SCALE_RANGE", scales, "the smaller scale first")
    for key, built_in in _BUILT_IN.items():
        if key in values and values[key] not in built_in:
            _check_registered(key, values[key])


def _check_registered(key: str, value: object) -> None:
    from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

    registries = {"ARCHITECTURE": META_ARCH_REGISTRY, "BACKBONE": BACKBONE_REGISTRY, "HEAD": SEM_SEG_HEADS_REGISTRY}
    known = [name for name, _ in next(registry for word, registry in registries.items() if word in key)]
    if value not in known:
        raise _not_allowed(
            key, value, f"{_listed(known)}, or one that your script registers before it loads the config"
        )


def _not_allowed(key: str, value: object, allowed: str) -> BLPSegError:
    return BLPSegError(f"config: {key} {str(value)[:100]!r} is not allowed; it takes {allowed}")


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(name or '""' for name in names))


def _frozen(value: object) -> object:
    """``value`` with tuples for lists: YAML has lists alone."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def report_unread(before: dict[str, object], after: dict[str, object]) -> None:
    """Warn about every key that a user changed although nothing reads it; ``before`` and ``after`` are the values of
    the defaults and of the loaded config by dotted key."""
    if after.get("MODEL.META_ARCHITECTURE") == "BLPSeg":
        for key in (key for key in after if _frozen(after[key]) != _frozen(before.get(key))):
            advice = next((text for pattern, text in UNREAD if re.fullmatch(pattern, key)), None)
            for pattern, part, readers in UNREAD_BY_PART:
                if re.fullmatch(pattern, key) and not re.fullmatch(readers, str(after.get(part))):
                    advice = f"{part} {after.get(part)} takes no such key"
            if advice:
                value = str(after[key])[:60]
                logger.warning(f"config: {key} {value} has no effect, BLPSeg does not read it: {advice}")
