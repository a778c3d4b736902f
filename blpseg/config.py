"""Every configuration key that BLPSeg adds to Detectron2's, its default and its meaning."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

try:
    from detectron2.config import CfgNode as CN
    from detectron2.config import get_cfg as get_detectron2_cfg
    from detectron2.projects.deeplab import add_deeplab_config
except ImportError as error:
    raise ImportError(
        f"blpseg needs Detectron2, which is missing or broken here ({error}); run `make install` in the "
        "project's root, or see 'Your own Detectron2' in README.md"
    ) from error

from .utils.config_rules import check_values, report_unread
from .utils.errors import BLPSegError, describe
from .utils.yaml_files import check_plain, read_config


def add_blpseg_config(cfg: CN) -> None:
    """Add BLPSeg's keys (and those of Detectron2's DeepLab project, whose backbone it uses) to ``cfg`` in place."""
    add_deeplab_config(cfg)
    _add_model_keys(cfg)
    _add_input_keys(cfg)
    _add_dataset_keys(cfg)
    _add_solver_keys(cfg)
    _add_test_keys(cfg)


def _add_model_keys(cfg: CN) -> None:
    # timm's networks, with MODEL.BACKBONE.NAME build_timm_backbone.
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"  # as timm.create_model takes it
    # What training starts from where MODEL.WEIGHTS is empty: "" random, "pretrained" (an installed package of weights,
    # else timm's download), or a file of timm's.
    cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.MODEL.TIMM.OUTPUT_STRIDE = 32  # 16 and 8 dilate, where the network can
    cfg.MODEL.TIMM.FREEZE_NORM = False  # batch norms keep statistics and weights, for few images a step
    _add_transformer_keys(cfg)

    # Of Detectron2's MODEL.SEM_SEG_HEAD, BLPSeg honours NAME, NUM_CLASSES, IN_FEATURES ([] = all that the backbone
    # gives), CONVS_DIM (channels of the decoder), COMMON_STRIDE and NORM.
    cfg.MODEL.BLPSEG = CN()
    cfg.MODEL.BLPSEG.RESET_CLASS_LAYERS = False  # MODEL.WEIGHTS of another class count: class layers start anew

    # Pyramid pooling of the decoder.
    cfg.MODEL.BLPSEG.DECODER = CN()
    cfg.MODEL.BLPSEG.DECODER.POOL_SCALES = [1, 2, 3, 6]
    cfg.MODEL.BLPSEG.DECODER.DROPOUT = 0.1  # Dropout2d after pyramid pooling

    # Hidden channels of the classifier and the annotation head.
    cfg.MODEL.BLPSEG.HEAD_CHANNELS = 256

    # Balancing the label preference: weight (1 - q p)^GAMMA; off = plain partial cross entropy.
    cfg.MODEL.BLPSEG.BLP = CN()
    cfg.MODEL.BLPSEG.BLP.ENABLED = True
    cfg.MODEL.BLPSEG.BLP.GAMMA = 2.0

    _add_loss_keys(cfg)

    # Local aggregation of the logits.
    cfg.MODEL.BLPSEG.LAM = CN()
    cfg.MODEL.BLPSEG.LAM.ENABLED = True
    cfg.MODEL.BLPSEG.LAM.SIGMA = 6.0  # grid cells at stride 4
    # See blpseg.modeling.local_aggregation; "sdpa" lacks the 1e-7, "window" far positions.
    cfg.MODEL.BLPSEG.LAM.IMPL = "auto"
    cfg.MODEL.BLPSEG.LAM.WINDOW = 4.0  # radius of IMPL "window" in units of SIGMA
    cfg.MODEL.BLPSEG.LAM.EMBEDDING_CHANNELS = 256

    # Annotation head.
    cfg.MODEL.BLPSEG.ANNOTATION = CN()
    cfg.MODEL.BLPSEG.ANNOTATION.UNANNOTATED_WEIGHT = 0.02  # class weight of "not annotated"
    # True: a head that learns where people scribble from distances and shallow features, and takes the class from the
    # segmentation head (blpseg/modeling/annotation_head.py); False: the published head.
    cfg.MODEL.BLPSEG.ANNOTATION.PLACE = False
    cfg.MODEL.BLPSEG.ANNOTATION.LR_FACTOR = 1.0  # learning rate of the annotation head in units of SOLVER.BASE_LR

    # Self-training on thresholded predictions.
    cfg.MODEL.BLPSEG.SELF_TRAINING = CN()
    cfg.MODEL.BLPSEG.SELF_TRAINING.ENABLED = True
    cfg.MODEL.BLPSEG.SELF_TRAINING.START_ITER = 10000  # first iteration that uses pseudo labels
    cfg.MODEL.BLPSEG.SELF_TRAINING.THRESHOLD = 0.9

    for old, new in _RENAMED.items():
        cfg.register_renamed_key(old, new)


# Keys of earlier versions.
_RENAMED = {
    "SOLVER.FINETUNE_OTHER_CLASSES": "MODEL.BLPSEG.RESET_CLASS_LAYERS",
    "MODEL.BLPSEG.NORM": "MODEL.SEM_SEG_HEAD.NORM",
    "MODEL.BLPSEG.DECODER.NAME": "MODEL.SEM_SEG_HEAD.NAME",
    "MODEL.BLPSEG.DECODER.CHANNELS": "MODEL.SEM_SEG_HEAD.CONVS_DIM",
    "MODEL.BLPSEG.LOSS": "MODEL.BLPSEG.LOSSES.<loss> <weight>",
    "MODEL.BLPSEG.REGULARIZERS": "MODEL.BLPSEG.LOSSES.<loss> <weight>",
    "MODEL.BLPSEG.ENTROPY_MINIMIZATION": "MODEL.BLPSEG.LOSSES.EntropyMinimization",
    "MODEL.BLPSEG.GATED_CRF.WEIGHT": "MODEL.BLPSEG.LOSSES.GatedCRF",
    "MODEL.BLPSEG.DENSE_CRF.WEIGHT": "MODEL.BLPSEG.LOSSES.DenseCRF",
}


def _add_transformer_keys(cfg: CN) -> None:
    # Detectron2's transformers, with MODEL.BACKBONE.NAME build_swin_backbone (the tiny one here) or build_vit_backbone
    # (base). Its classes have the arguments by these names.
    cfg.MODEL.SWIN = CN()
    cfg.MODEL.SWIN.EMBED_DIM = 96
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    cfg.MODEL.VIT = CN()
    cfg.MODEL.VIT.IMG_SIZE = 512  # the grid of the relative positions; images may be smaller or larger
    cfg.MODEL.VIT.PATCH_SIZE = 16
    cfg.MODEL.VIT.EMBED_DIM = 768
    cfg.MODEL.VIT.DEPTH = 12
    cfg.MODEL.VIT.NUM_HEADS = 12
    cfg.MODEL.VIT.DROP_PATH_RATE = 0.1
    cfg.MODEL.VIT.WINDOW_SIZE = 0  # of the blocks in WINDOW_BLOCK_INDEXES; 0 = all blocks see the whole image
    cfg.MODEL.VIT.WINDOW_BLOCK_INDEXES = []
    cfg.MODEL.VIT.USE_REL_POS = False
    cfg.MODEL.VIT.SQUARE_PAD = 0  # side of the square that images are padded to; 0 = none


def _add_loss_keys(cfg: CN) -> None:
    # Weights of the training losses by their name in LOSS_REGISTRY (formulas and sources in blpseg/modeling/losses/);
    # 0 = off. A loss of your own is one more line in a YAML file.
    cfg.MODEL.BLPSEG.LOSSES = CN(new_allowed=True)
    cfg.MODEL.BLPSEG.LOSSES.BLPLoss = 1.0
    cfg.MODEL.BLPSEG.LOSSES.AnnotationLoss = 1.0
    cfg.MODEL.BLPSEG.LOSSES.EntropyMinimization = 0.0
    cfg.MODEL.BLPSEG.LOSSES.GatedCRF = 0.0
    cfg.MODEL.BLPSEG.LOSSES.DenseCRF = 0.0
    cfg.MODEL.BLPSEG.LOSSES.MeanTeacher = 0.0
    cfg.MODEL.BLPSEG.LOSSES.PartialDice = 0.0
    cfg.MODEL.BLPSEG.LOSSES.SoftSelfLabelling = 0.0
    cfg.MODEL.BLPSEG.LOSSES.TreeEnergy = 0.0
    cfg.MODEL.BLPSEG.GATED_CRF = CN()
    cfg.MODEL.BLPSEG.GATED_CRF.RADIUS = 5  # of the square window, grid cells at stride 4
    cfg.MODEL.BLPSEG.GATED_CRF.SIGMA_XY = 6.0  # grid cells at stride 4
    cfg.MODEL.BLPSEG.GATED_CRF.SIGMA_RGB = 0.1  # colour distance, channels in 0..1
    cfg.MODEL.BLPSEG.DENSE_CRF = CN()
    cfg.MODEL.BLPSEG.DENSE_CRF.SIGMA_XY = 100.0  # pixels
    cfg.MODEL.BLPSEG.DENSE_CRF.SIGMA_RGB = 15.0  # colour distance, channels in 0..255
    cfg.MODEL.BLPSEG.DENSE_CRF.MAX_POSITIONS = 2304  # larger grids are averaged over squares of cells
    cfg.MODEL.BLPSEG.MEAN_TEACHER = CN()
    cfg.MODEL.BLPSEG.MEAN_TEACHER.DECAY = 0.99  # of the moving average of the weights, a step
    cfg.MODEL.BLPSEG.MEAN_TEACHER.RAMP_ITERS = 1000  # until the loss has its full weight
    cfg.MODEL.BLPSEG.SOFT_SELF_LABELLING = CN()
    cfg.MODEL.BLPSEG.SOFT_SELF_LABELLING.POTTS_WEIGHT = 2.0
    cfg.MODEL.BLPSEG.SOFT_SELF_LABELLING.SIGMA_RGB = 0.1  # colour distance, channels in 0..1
    cfg.MODEL.BLPSEG.SOFT_SELF_LABELLING.STEPS = 20  # of gradient descent to the pseudo labels
    cfg.MODEL.BLPSEG.SOFT_SELF_LABELLING.STEP_SIZE = 0.5
    cfg.MODEL.BLPSEG.TREE_ENERGY = CN()
    cfg.MODEL.BLPSEG.TREE_ENERGY.SIGMA = 0.002  # squared distance of normalised colours


def _add_input_keys(cfg: CN) -> None:
    # "scribble" trains on scribble_file_name; "dense" on sem_seg_file_name, the fully supervised upper bound.
    cfg.INPUT.SUPERVISION = "scribble"
    cfg.INPUT.SCALE_RANGE = [0.75, 1.25]  # uniform random scale of a training image
    # Where an image is longer, all scales (SCALE_RANGE and TEST.AUG.SCALES) are those of an image of this longest side,
    # so that one config serves photographs of any size; 0 = scales of the image as it is.
    cfg.INPUT.LONGEST_SIDE = 0
    cfg.INPUT.ROTATION_DEGREES = 0.0  # uniform in +- this many degrees; 0 = off
    # Photometric jitter: factors uniform in 1 +- strength (0..1), hue in +- strength turns (0..0.5); 0 = off.
    cfg.INPUT.COLOR_JITTER = CN()
    cfg.INPUT.COLOR_JITTER.BRIGHTNESS = 0.0
    cfg.INPUT.COLOR_JITTER.CONTRAST = 0.0
    cfg.INPUT.COLOR_JITTER.SATURATION = 0.0
    cfg.INPUT.COLOR_JITTER.HUE = 0.0


def _add_dataset_keys(cfg: CN) -> None:
    # About this part of the images of DATASETS.TRAIN is kept from training and stands in the catalogs as
    # <NAME>_held_out. With DATASETS.TEST "()" the model is evaluated on it, by its strokes where it has no masks.
    cfg.DATASETS.HOLD_OUT = 0.0
    # A user's own folder. With NAME set, "<NAME>_train" and "<NAME>_val" stand in the catalog.
    cfg.DATASETS.FOLDER = CN()
    cfg.DATASETS.FOLDER.NAME = ""
    cfg.DATASETS.FOLDER.ROOT = ""  # the paths below are relative to it
    cfg.DATASETS.FOLDER.CLASSES = []  # names in label order, background first
    cfg.DATASETS.FOLDER.COLORS = []  # [R, G, B] of each class; empty = blpseg.utils.palette.distinct_colors
    cfg.DATASETS.FOLDER.CLASSES_FILE = ""  # or YAML: `classes: [...]` (and `colors`), or a vocabulary
    cfg.DATASETS.FOLDER.TRAIN_IMAGES = "images/train"
    cfg.DATASETS.FOLDER.TRAIN_SCRIBBLES = "scribbles/train"
    cfg.DATASETS.FOLDER.TRAIN_MASKS = ""  # dense masks of the training images, optional
    cfg.DATASETS.FOLDER.SKIP_UNANNOTATED = False  # leave out training images that have no scribble file (yet)
    cfg.DATASETS.FOLDER.VAL_IMAGES = "images/val"
    cfg.DATASETS.FOLDER.VAL_SCRIBBLES = "scribbles/val"  # where there are no masks
    cfg.DATASETS.FOLDER.VAL_MASKS = "masks/val"
    cfg.DATASETS.FOLDER.IGNORE_LABEL = 255  # in the dense masks
    cfg.DATASETS.FOLDER.EVALUATOR = "sem_seg"  # "sem_seg", or "sem_seg_volume" for 3-D Dice as well


def _add_solver_keys(cfg: CN) -> None:
    cfg.SOLVER.OPTIMIZER = "AdamW"  # or "SGD" with SOLVER.MOMENTUM
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0  # learning rate of the backbone in units of SOLVER.BASE_LR
    cfg.SOLVER.AMP.DTYPE = "float16"  # or "bfloat16", also for CPUs that have it
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # parts of each process's batch, one after the other: less memory, same losses
    cfg.SOLVER.CHANNELS_LAST = False
    cfg.SOLVER.COMPILE = False  # torch.compile of backbone and decoder

    cfg.OUTPUT = CN()
    cfg.OUTPUT.LOG_PERIOD = 20  # iterations between lines, metrics.json and TensorBoard points
    cfg.OUTPUT.KEEP_CHECKPOINTS = 2  # newest ones that stay, beside model_best.pth and model_final.pth
    # model_best.pth and model_final.pth without the optimiser's state, a third of the size; --resume does without them.
    cfg.OUTPUT.SLIM_MODELS = True
    # Iterations between pictures of training images in TensorBoard, with coverage and precision of their pseudo
    # labels; 0 = off.
    cfg.OUTPUT.PANEL_PERIOD = 500
    cfg.OUTPUT.PANEL_IMAGES = 4
    cfg.OUTPUT.WANDB_PROJECT = ""  # Weights & Biases project; "" = off


def _add_test_keys(cfg: CN) -> None:
    # Scales of multi-scale inference (METHOD.md section 7); TEST.AUG.ENABLED and .FLIP are Detectron2's.
    cfg.TEST.AUG.SCALES = [0.5, 0.75, 1.0, 1.25]

    # Images of more than ABOVE pixels are segmented in overlapping square tiles, so that memory does not grow
    # with the image. ABOVE 0 = never.
    cfg.TEST.TILE = CN()
    cfg.TEST.TILE.ABOVE = 700_000
    cfg.TEST.TILE.SIZE = 512  # side of a tile, pixels
    cfg.TEST.TILE.OVERLAP = 128  # pixels that neighbouring tiles share, at least

    # Dense CRF (Kraehenbuehl & Koltun 2011) on the softmax; METHOD.md section 7's numbers. Needs pydensecrf2.
    cfg.TEST.CRF = CN()
    cfg.TEST.CRF.ENABLED = False
    cfg.TEST.CRF.ITERATIONS = 1
    cfg.TEST.CRF.GAUSSIAN_SXY = 3
    cfg.TEST.CRF.GAUSSIAN_COMPAT = 3
    cfg.TEST.CRF.BILATERAL_SXY = 32
    cfg.TEST.CRF.BILATERAL_SRGB = 13
    cfg.TEST.CRF.BILATERAL_COMPAT = 10
    cfg.TEST.CRF.NUM_WORKERS = 0  # processes that share the images of a rank; 0 = one a CPU core, shared by the ranks

    cfg.TEST.WRITE_PREDICTIONS = False  # class numbers as grey PNG, in the folders of PASCAL's evaluation server
    cfg.TEST.PALETTE = False  # store the class colours in them; OpenCV then reads colours
    cfg.TEST.BOUNDARY_IOU = False  # Detectron2's BoundaryIoU beside IoU; several times slower
    cfg.TEST.COCO_JSON = False  # Detectron2's sem_seg_predictions.json (run lengths of every segment); slow

    # The estimate from scribbles (blpseg/evaluation/from_scribbles.py) also where there are masks to compare it with.
    cfg.TEST.SCRIBBLE_ESTIMATE = False
    # Where is it wrong? IoU by distance to scribble and boundary and by thickness, figures, best and worst images.
    cfg.TEST.REPORT = CN()
    cfg.TEST.REPORT.ENABLED = False
    cfg.TEST.REPORT.PANELS = 10  # best and worst images drawn, each


def get_cfg(config_file: str = "", opts: Sequence = (), add_keys: Callable[[CN], object] | None = None) -> CN:
    """Detectron2's defaults + BLPSeg's + a YAML file (with ``_BASE_``) + ``KEY VALUE`` pairs, validated.

    Args:
        config_file: path of a YAML file, or the name of one of BLPSeg's own (``Synthetic-Scribble/blpseg_tiny.yaml``)
            where no such path exists, or "" for the defaults alone.
        opts: alternating keys and values, as on the command line.
        add_keys: called with the defaults; adds the keys of a project that builds on this one.

    Raises:
        BLPSegError: as :func:`load_config`.
    """
    cfg = get_detectron2_cfg()
    add_blpseg_config(cfg)
    if add_keys is not None:
        add_keys(cfg)
    load_config(cfg, config_file, opts)
    return cfg


def load_config(cfg: CN, config_file: str = "", opts: Sequence = ()) -> None:
    """Merge a YAML file and ``KEY VALUE`` pairs into ``cfg`` in place and validate it.

    :func:`get_cfg` calls it. Detectron2's ``cfg.merge_from_file`` works as well, without the checks.

    Args:
        cfg: Detectron2's config with BLPSeg's keys and perhaps others.
        config_file, opts: as for :func:`get_cfg`.

    Raises:
        BLPSegError: the file or its ``_BASE_`` is missing or no YAML, a key does not exist (near matches are named), a
            value has the wrong type or is not allowed (:mod:`blpseg.utils.config_rules`).
    """
    before = flatten(cfg)
    if config_file:
        node = read_config(_find_config(config_file))
        _merge(cfg, lambda: cfg.merge_from_other_cfg(CN(node)), config_file, flatten(node))
    opts = list(opts)
    if len(opts) % 2:
        raise BLPSegError(f"config options come as KEY VALUE pairs; {opts[-1]!r} stands alone")
    for key in opts[::2]:
        parent, _, name = str(key).rpartition(".")
        if parent == "MODEL.BLPSEG.LOSSES":
            cfg.MODEL.BLPSEG.LOSSES.setdefault(name, 0.0)  # a loss of the user's own
    given = {str(key): value for key, value in zip(opts[::2], opts[1::2], strict=True)}
    check_plain(given, "command line")
    _merge(
        cfg,
        lambda: cfg.merge_from_list([str(x) if i % 2 == 0 else x for i, x in enumerate(opts)]),
        "command line",
        given,
    )
    values = flatten(cfg)
    check_values(values, before)
    report_unread(before, values)


def _find_config(name: str) -> str:
    """``name`` if it is a file, else the file of that name among the configs of this clone or installed wheel."""
    package = Path(__file__).parent
    for path in (name, *(str(folder / "configs" / name) for folder in (package.parent, package))):
        if os.path.isfile(path) or "://" in path:
            return path
    raise BLPSegError(f"{name}: no such config file")


def flatten(node: dict) -> dict[str, object]:
    """The values of a config (``CfgNode`` or what its YAML holds) by dotted key: ``SOLVER.MAX_ITER``."""
    return {key: value for key, value in _entries(node) if not isinstance(value, dict)}


def _merge(cfg: CN, merge: Callable[[], object], source: str, given: dict) -> None:
    try:
        merge()
    except (KeyError, AssertionError) as error:
        # yacs: KeyError "Non-existent config key: A.B" from a file, AssertionError "Non-existent key: A.B" from a list.
        if "Non-existent" not in str(error):
            raise BLPSegError(f"{source}: {error.args[0]}") from error
        key = str(error.args[0]).rsplit(": ", 1)[-1]
        near = difflib.get_close_matches(key.upper(), [name for name, _ in _entries(cfg)], n=3, cutoff=0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else "; blpseg/config.py lists BLPSeg's keys"
        raise BLPSegError(f"{source}: unknown config key {key}{hint}") from error
    except (ValueError, SyntaxError, TypeError, AttributeError) as error:
        key = str(error).rpartition("config key: ")[2]  # of yacs' line about types
        default = dict(_entries(cfg)).get(key)
        if default is None:
            raise BLPSegError(f"{source}: {describe(error)[:300]}") from error
        kind = next((words for types, words in _KINDS.items() if isinstance(default, types)), "another type")
        now = "" if isinstance(default, dict) else f", like {default!r}"
        value = str(given.get(key, ""))[:100]
        raise BLPSegError(f"{source}: {key} {value!r} is not allowed; it takes {kind}{now}") from error
    except (RecursionError, MemoryError) as error:
        raise BLPSegError(f"{source}: a value is nested too deeply") from error


_KINDS: dict[type | tuple[type, ...], str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number with a decimal point",
    str: "text",
    (list, tuple): "a list",
    dict: "a mapping of keys",
}


def _entries(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every (dotted key, value or node) below ``node``."""
    for key, value in node.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}.")
