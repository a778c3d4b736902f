"""Failures of a step in one line that names the setting to change."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from detectron2.config import CfgNode

from ..utils.errors import BLPSegError, describe

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)


@contextlib.contextmanager
def explain_failure(cfg: CfgNode, images: int) -> Iterator[None]:
    """Turn the failures of forward and backward that a setting would avoid into a BLPSegError that names it. ``images``
    are those of each process."""
    solver = cfg.SOLVER
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        raise BLPSegError(
            f"out of memory with {images} image(s) a process: raise SOLVER.ACCUMULATION_STEPS "
            f"({solver.ACCUMULATION_STEPS}), lower SOLVER.IMS_PER_BATCH ({solver.IMS_PER_BATCH}) or INPUT.CROP.SIZE "
            f"({list(cfg.INPUT.CROP.SIZE)}), set SOLVER.AMP.ENABLED True ({solver.AMP.ENABLED}) and "
            f"MODEL.BLPSEG.LAM.IMPL auto ({cfg.MODEL.BLPSEG.LAM.IMPL}): {describe(error)[:160]}"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise BLPSegError(
            "batch norm cannot train on one image at a time (pyramid pooling leaves one value a channel): give each "
            f"process and part at least 2 images (SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, "
            f"SOLVER.ACCUMULATION_STEPS {solver.ACCUMULATION_STEPS}), or set MODEL.SEM_SEG_HEAD.NORM GN or FrozenBN"
        ) from error


def loader_error(error: Exception) -> Exception:
    """The one-line form of what the training loader raised."""
    if isinstance(error, StopIteration):
        return BLPSegError("the training loader ran out of batches; is the data set of DATASETS.TRAIN empty?")
    if "Original Traceback" in str(error):  # torch puts the worker's traceback into the message
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        return BLPSegError(f"a loader worker failed: {last}; check the data with tools/check_dataset.py")
    return error
