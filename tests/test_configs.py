"""Every config in configs/ builds, takes one training step and segments one image; METHOD section 6 to the letter."""

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from blpseg import get_cfg

from .conftest import ROOT

CONFIGS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*/*.yaml"))
# The same layers, fewer of them and narrower, so that all configs take a minute: what a config says of depth and width
# is checked by name below.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 16, "MODEL.BLPSEG.HEAD_CHANNELS", 16, "MODEL.BLPSEG.LAM.EMBEDDING_CHANNELS", 8),
]

NARROW = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_one_step_and_one_image(config):
    cfg = get_cfg(str(ROOT / config), SMALL)
    if cfg.MODEL.RESNETS.DEPTH > 34:  # Detectron2 takes a smaller ResNet at its own width only
        cfg.merge_from_list(NARROW)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert name in DatasetCatalog.list()
        assert len(MetadataCatalog.get(name).stuff_classes) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    model = build_model(cfg)
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    scribble = torch.full((48, 64), classes)
    scribble[4:9, 4:50] = 1
    present = torch.zeros(classes, dtype=torch.bool)
    present[:2] = True
    sample = {"image": torch.randint(256, (3, 48, 64)).float(), "scribble": scribble, "image_classes": present}
    optimizer = torch.optim.AdamW(model.parameters(), cfg.SOLVER.BASE_LR)
    losses = model.train()([sample, sample])
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()([sample])[0]["sem_seg"].shape == (classes, 48, 64)


def load(name):
    return get_cfg(str(ROOT / "configs" / name))


@pytest.mark.parametrize(
    ("name", "classes", "lr", "batch", "iterations", "self_training"),
    [
        # 40 epochs of 10,582 images in tens; 85 of 4,998 in eights.
        ("PascalVOC-Scribble/blpseg_R101.yaml", 21, 3e-5, 10, 40 * 10582 / 10, 10_000),
        ("PascalContext-Scribble/blpseg_R101.yaml", 60, 2.4e-5, 8, 85 * 4998 / 8, 20_000),
    ],
)
def test_recipe_of_the_paper(name, classes, lr, batch, iterations, self_training):
    cfg = load(name)
    solver, blpseg = cfg.SOLVER, cfg.MODEL.BLPSEG
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == classes
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY) == ("AdamW", lr, 0.01)
    assert {solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS} <= {None, 0.01}  # None: as every weight
    assert (solver.LR_SCHEDULER_NAME, solver.POLY_LR_POWER, solver.WARMUP_ITERS) == ("WarmupPolyLR", 0.9, 0)
    assert solver.POLY_LR_CONSTANT_ENDING == 0 and not solver.CLIP_GRADIENTS.ENABLED
    assert solver.IMS_PER_BATCH == batch and abs(solver.MAX_ITER - iterations) < 1
    assert solver.AMP.ENABLED
    assert cfg.MODEL.WEIGHTS == "detectron2://DeepLab/R-103.pkl" and cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert (blpseg.BLP.ENABLED, blpseg.BLP.GAMMA) == (True, 2)
    assert (blpseg.LAM.ENABLED, blpseg.LAM.SIGMA) == (True, 6)
    assert blpseg.LAM.IMPL == "auto", "an approximation would not give the published numbers"
    assert blpseg.ANNOTATION.UNANNOTATED_WEIGHT == 0.02
    assert (blpseg.SELF_TRAINING.ENABLED, blpseg.SELF_TRAINING.START_ITER) == (True, self_training)
    assert blpseg.SELF_TRAINING.THRESHOLD == 0.9
    assert cfg.INPUT.RANDOM_FLIP == "horizontal" and list(cfg.INPUT.SCALE_RANGE) == [0.75, 1.25]
    assert (cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, list(cfg.INPUT.CROP.SIZE)) == (True, "absolute", [384, 384])
    assert cfg.INPUT.ROTATION_DEGREES == 0 and not any(cfg.INPUT.COLOR_JITTER.values())
    assert cfg.TEST.AUG.ENABLED and cfg.TEST.AUG.FLIP and list(cfg.TEST.AUG.SCALES) == [0.5, 0.75, 1.0, 1.25]


def test_variants_change_one_thing():
    base = load("PascalVOC-Scribble/blpseg_R101.yaml")
    changed = {
        "blpseg_R101_os16": {"MODEL.RESNETS.RES5_DILATION"},
        "blpseg_R101_os8": {"MODEL.RESNETS.RES4_DILATION", "MODEL.RESNETS.RES5_DILATION"},
        "blpseg_R50": {"MODEL.RESNETS.DEPTH", "MODEL.WEIGHTS"},
        "blpseg_R101_no_lam": {"MODEL.BLPSEG.LAM.ENABLED"},
        "blpseg_R101_no_blp": {"MODEL.BLPSEG.BLP.ENABLED"},
        "blpseg_R101_no_self_training": {"MODEL.BLPSEG.SELF_TRAINING.ENABLED"},
        "blpseg_R101_frozen_bn": {"MODEL.RESNETS.NORM"},
    }
    for name, keys in changed.items():
        assert differences(base, load(f"PascalVOC-Scribble/{name}.yaml")) == keys | {"OUTPUT_DIR"}


def differences(a, b, prefix=""):
    keys = set()
    for key in a:
        if isinstance(a[key], dict):
            keys |= differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            keys.add(prefix + key)
    return keys
