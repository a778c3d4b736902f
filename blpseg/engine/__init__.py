"""Training: the Trainer, the processes of a run, checkpoints, logs and pictures.

The names are imported when they are first asked for, so that a command line that only shows its help loads no PyTorch.
"""

import importlib

_MODULES = {
    "Trainer": "trainer",
    "argument_parser": "arguments",
    "default_setup": "defaults",
    "launch": "processes",
    "load_trained": "resume",
    "replay": "nan_dump",
}

__all__ = list(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
