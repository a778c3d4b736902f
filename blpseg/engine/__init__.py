"""Training: the loop, what watches it, checkpoints, several processes."""

from .train import run
from .trainer import Trainer

__all__ = ["Trainer", "run"]
