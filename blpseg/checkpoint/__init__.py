"""Reading weights safely, writing checkpoints atomically, converting published ones."""

from ..utils.weights_files import load_file, state_dict_of
from .weights import load_weights
from .writing import Checkpointer, provenance, save_atomic

__all__ = ["Checkpointer", "load_file", "load_weights", "provenance", "save_atomic", "state_dict_of"]
