"""BLPSeg: semantic segmentation learned from scribbles, on Detectron2.

Importing the package registers its models, heads, losses and data sets with Detectron2, as soon as Detectron2 itself
is imported. It loads neither Detectron2 nor PyTorch, so that a command that only converts files starts at once.
"""

import importlib
import warnings
from typing import TYPE_CHECKING

from .utils.detectron2_fixes import let_evaluator_copy
from .utils.imports import when_imported

if TYPE_CHECKING:
    from .config import add_blpseg_config
    from .evaluation.predictor import Predictor

__version__ = "0.2.0"
__all__ = ["Predictor", "__version__", "add_blpseg_config", "get_cfg"]

# Detectron2 scripts two functions at import, and recent torch warns about it at every start.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)

when_imported("detectron2.modeling", lambda: importlib.import_module("blpseg.modeling"))
when_imported("detectron2.data", lambda: importlib.import_module("blpseg.data.datasets"))
when_imported("detectron2.evaluation.sem_seg_evaluation", let_evaluator_copy)


def get_cfg(config_file="", opts=(), add_keys=None):
    """:func:`blpseg.config.get_cfg`, with the folder data set that the config names put in the catalog."""
    from . import config
    from .data.datasets import register_datasets

    cfg = config.get_cfg(config_file, opts, add_keys)
    register_datasets(cfg)
    return cfg


_MODULES = {"add_blpseg_config": "config", "Predictor": "evaluation.predictor"}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
