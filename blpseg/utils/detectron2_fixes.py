"""What the installed Detectron2 gets wrong and its main branch has mended."""

from __future__ import annotations

import inspect


def let_evaluator_copy() -> None:
    """Make Detectron2's ``SemSegEvaluator`` read masks under NumPy 2; does nothing where it can.

    Its reader calls ``np.array(image, copy=False)``, which meant "copy if needed" and since NumPy 2 means "never copy",
    an error for any image. ``copy=None`` is the new spelling (NumPy 2.0 migration guide).
    """
    import numpy as np
    from detectron2.evaluation import sem_seg_evaluation

    reader = sem_seg_evaluation.load_image_into_numpy_array
    parameters = inspect.signature(reader).parameters
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0" and "copy" in parameters and parameters["copy"].default is False:
        defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
        reader.__defaults__ = tuple({**defaults, "copy": None}.values())
