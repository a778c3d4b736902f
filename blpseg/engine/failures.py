"""What goes wrong in a step, told in one line; and a dump that repeats the step."""

from __future__ import annotations

import os
import re

import numpy as np
import torch
from detectron2.config import CfgNode

from ..checkpoint import save_atomic
from ..utils.errors import BLPSegError, describe

__all__ = ["Diagnosis", "loader_error", "save_dump"]

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)


class Diagnosis:
    """Turns failures of forward and backward that a setting would avoid into the name of the setting."""

    def __init__(self, cfg: CfgNode, images_per_process: int):
        self.cfg = cfg
        self.images = images_per_process

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
            cfg = self.cfg
            raise BLPSegError(
                f"out of memory with {self.images} image(s) a process: raise SOLVER.ACCUMULATION_STEPS "
                f"({cfg.SOLVER.ACCUMULATION_STEPS}), lower SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) or "
                "INPUT.CROP.SIZE "
                f"({list(cfg.INPUT.CROP.SIZE)}), set SOLVER.AMP.ENABLED True ({cfg.SOLVER.AMP.ENABLED}) and "
                f"MODEL.BLPSEG.LAM.IMPL auto ({cfg.MODEL.BLPSEG.LAM.IMPL}): {describe(error)[:160]}"
            ) from error
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise BLPSegError(
                "batch norm cannot train on one image at a time (pyramid pooling leaves one value a channel): "
                "give each process "
                f"and part at least 2 images (SOLVER.IMS_PER_BATCH {self.cfg.SOLVER.IMS_PER_BATCH}, "
                "SOLVER.ACCUMULATION_STEPS "
                f"{self.cfg.SOLVER.ACCUMULATION_STEPS}), or set MODEL.SEM_SEG_HEAD.NORM GN or FrozenBN"
            ) from error
        return False


def loader_error(error: Exception) -> Exception:
    """The one-line form of what the loader raised."""
    if isinstance(error, StopIteration):
        return BLPSegError("the training loader ran out of batches; is the data set of DATASETS.TRAIN empty?")
    if "Original Traceback" in str(error):  # torch puts the worker's traceback into the message
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        return BLPSegError(f"a loader worker failed: {last}; check the data with tools/check_dataset.py")
    return error


def _plain(value):
    """``value`` as something ``torch.load(weights_only=True)`` reads."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (torch.Tensor, str, int, float, bool, type(None))) else str(value)


def save_dump(trainer, culprits: list[str]) -> str:
    """Write the step under way: batch, weights from before it, config, and what its random numbers follow from."""
    path = os.path.join(trainer.cfg.OUTPUT_DIR, f"dump_iter{trainer.iter:07d}_rank{trainer.rank}.pth")
    dump = {
        "batch": _plain(trainer.batch),
        "model": trainer.model.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "iteration": trainer.iter,
        "seed": trainer.cfg.SEED,
        "rank": trainer.rank,
        "world_size": trainer.world_size,
        "culprits": culprits,
        "config": trainer.cfg.dump(),
    }
    save_atomic(path, dump)
    return path
