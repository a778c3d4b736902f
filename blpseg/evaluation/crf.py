"""Dense CRF as a last step of inference (METHOD section 7); needs the package pydensecrf2."""

from __future__ import annotations

import collections
from dataclasses import dataclass, fields

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..utils.errors import BLPSegError
from ..utils.parallel import default_workers, process_pool


@dataclass(frozen=True, kw_only=True)
class DenseCRF:
    """Fully connected CRF with Gaussian pairwise terms (Kraehenbuehl and Koltun, NIPS 2011), by mean field.

    Picklable, so that it can be sent to other processes.

    Attributes:
        iterations: of mean field.
        gaussian_sxy, bilateral_sxy: standard deviations in pixels.
        bilateral_srgb: standard deviation in grey levels, 0..255.
        gaussian_compat, bilateral_compat: weights of the Potts model.
    """

    iterations: int = 1
    gaussian_sxy: float = 3
    gaussian_compat: float = 3
    bilateral_sxy: float = 32
    bilateral_srgb: float = 13
    bilateral_compat: float = 10

    def __post_init__(self):
        """Raises BLPSegError: pydensecrf2 is not installed."""
        _pydensecrf()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> DenseCRF:
        """``TEST.CRF`` of a config."""
        return cls(**{field.name: cfg.TEST.CRF[field.name.upper()] for field in fields(cls)})

    def __call__(self, logits: np.ndarray, image: np.ndarray) -> np.ndarray:
        """(C, H, W) logits, (H, W, 3) uint8 RGB -> (H, W) class map, uint8 (int64 beyond 256 classes).

        The library's lattice treats the channels nearly, not quite, alike.
        """
        from scipy.special import softmax

        densecrf, unary_from_softmax = _pydensecrf()
        classes, height, width = logits.shape
        field = densecrf.DenseCRF2D(width, height, classes)
        field.setUnaryEnergy(unary_from_softmax(softmax(np.asarray(logits, dtype=np.float32), axis=0)))
        field.addPairwiseGaussian(sxy=self.gaussian_sxy, compat=self.gaussian_compat)
        field.addPairwiseBilateral(
            sxy=self.bilateral_sxy,
            srgb=self.bilateral_srgb,
            rgbim=np.ascontiguousarray(image),
            compat=self.bilateral_compat,
        )
        classes_map = np.asarray(field.inference(self.iterations)).argmax(axis=0).reshape(height, width)
        return classes_map.astype(np.uint8) if classes <= 256 else classes_map


def _pydensecrf():
    try:
        from pydensecrf import densecrf
        from pydensecrf.utils import unary_from_softmax
    except ImportError as error:
        raise BLPSegError(
            f"TEST.CRF.ENABLED: the dense CRF needs pydensecrf2 ({error}); pip install 'blpseg[crf]' builds it, "
            "or set TEST.CRF.ENABLED False"
        ) from error
    return densecrf, unary_from_softmax


class CRFEvaluator(DatasetEvaluator):
    """Hands predictions to another evaluator after a dense CRF, several images at a time.

    pydensecrf holds Python's interpreter lock, so several processes work on different images.
    """

    def __init__(self, evaluator: DatasetEvaluator, crf: DenseCRF, workers: int = 0, image_format: str = "RGB"):
        """
        Args:
            evaluator: gets (H, W) class maps, in the order of the images.
            crf: applied to each prediction.
            workers: processes; 0 divides the CPU cores among the run's processes on this machine and takes one
                process for each core.
            image_format: "RGB" or "BGR", the channels of the inputs' ``image``.
        """
        self._evaluator = evaluator
        self._crf = crf
        self._swap = image_format == "BGR"
        self._workers = workers or max(1, default_workers() // comm.get_local_size())
        self._pool = None
        self._pending = collections.deque()

    def reset(self) -> None:
        self._evaluator.reset()
        self._close()
        self._pool = process_pool(self._workers)
        self._pool.submit(int).result()  # the processes start now, before other threads do

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """As :meth:`SemSegEvaluator.process`; ``sem_seg`` must be logits and ``image`` (3, H', W') in 0..255."""
        for x, output in zip(inputs, outputs, strict=True):
            logits = output["sem_seg"].cpu().numpy()
            image = image_array(x["image"].flip(0) if self._swap else x["image"], logits.shape[-2:])
            # Only the record, so that the queue does not keep the images' tensors.
            record = {key: value for key, value in x.items() if not isinstance(value, torch.Tensor)}
            rest = {key: value for key, value in output.items() if key != "sem_seg"}
            self._pending.append((record, rest, self._pool.submit(self._crf, logits, image)))
            while len(self._pending) > 2 * self._workers:
                self._take()

    def _take(self) -> None:
        record, rest, future = self._pending.popleft()
        self._evaluator.process([record], [{"sem_seg": torch.from_numpy(future.result()), **rest}])

    def evaluate(self):
        try:
            while self._pending:
                self._take()
        finally:
            self._close()
        return self._evaluator.evaluate()

    def _close(self) -> None:
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def image_array(image: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """(3, H', W') in 0..255 -> (H, W, 3) uint8 of ``size``."""
    array = image.cpu().round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    if array.shape[:2] != tuple(size):
        array = cv2.resize(array, tuple(size)[::-1], interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(array)
