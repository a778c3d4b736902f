"""What a model was trained on, against what it is used for: warnings of figures and names that would mislead."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .held_out import SUFFIX, test_sets

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def warn_of_seen(cfg: CfgNode, trained: Mapping) -> None:
    """Warn of each data set to test on whose images a model was trained on; ``trained`` is the config of its training,
    as nested mappings."""
    datasets = trained.get("DATASETS") or {}
    share = datasets.get("HOLD_OUT") or 0
    for name in test_sets(cfg):
        source = name.removesuffix(SUFFIX)
        if source in (datasets.get("TRAIN") or ()) and (source == name or share < cfg.DATASETS.HOLD_OUT):
            logger.warning(
                f"{name}: the model is trained on images of it ({source} with DATASETS.HOLD_OUT {share}), so its "
                "scores are too high; hold out as many images in training, or name another set in DATASETS.TEST"
            )


def class_names(cfg: CfgNode) -> list[str]:
    """The names of the classes, by the first data set of ``DATASETS.TRAIN`` and ``TEST`` that has them; [] without."""
    from detectron2.data import MetadataCatalog

    named = (MetadataCatalog.get(name).get("stuff_classes") for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    return list(next(filter(None, named), ()))


def warn_of_classes(cfg: CfgNode, checkpoint: Mapping, path: str) -> None:
    """Warn where the classes that a checkpoint, the file ``path``, was trained with are not those of the config."""
    own, theirs = class_names(cfg), checkpoint.get("class_names")
    if own and isinstance(theirs, list) and len(theirs) == len(own):
        other = [(i, a, b) for i, (a, b) in enumerate(zip(theirs, own, strict=True)) if a != b]
        if other:
            number, before, now = other[0]
            logger.warning(f"{path}: its class {number} is {before!r}, the config's {now!r}; names go by their order")
