"""BLPSeg: semantic segmentation learned from scribbles, on Detectron2.

Importing the package registers its models, decoders, losses and data sets with Detectron2.
"""

import warnings

__version__ = "0.2.0"

# Detectron2 scripts two functions at import; recent torch tells every user so at every start.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)

try:
    import detectron2.config  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"blpseg needs Detectron2, which is missing or broken here ({error}); run `make install` in the "
        "project's root, or see 'Your own Detectron2' in README.md"
    ) from None

from . import modeling  # noqa: E402, F401  (registers)
from .config import add_blpseg_config  # noqa: E402
from .config import get_cfg as _get_cfg  # noqa: E402
from .data import datasets  # noqa: E402

__all__ = ["Predictor", "__version__", "add_blpseg_config", "get_cfg"]


def get_cfg(config_file="", opts=()):
    """:func:`blpseg.config.get_cfg`, with the folder data set that the config names put in the catalog."""
    cfg = _get_cfg(config_file, opts)
    datasets.register_folder(cfg)
    return cfg


def __getattr__(name):
    # Evaluation needs packages that preparing data or a bare import should not wait for.
    if name == "Predictor":
        from .evaluation.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'blpseg' has no attribute {name!r}")
