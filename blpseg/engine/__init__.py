"""Training: the loop, what watches it, checkpoints, several processes."""

from .checkpoint import Checkpointer, load_file, load_weights
from .train import run
from .trainer import Trainer

__all__ = ["Checkpointer", "Trainer", "load_file", "load_weights", "run"]
