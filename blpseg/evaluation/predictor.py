"""Images in, class maps out."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image, ImageOps
from torch import nn

from .. import get_cfg
from ..checkpoint import load_file, load_weights
from ..data.datasets.trained import warn_of_classes
from ..utils.device import choose_device
from ..utils.errors import BLPSegError
from ..utils.files import read_image
from .crf import DenseCRF
from .inference import Inference, class_map

logger = logging.getLogger(__name__)


def load_model(cfg: CfgNode) -> nn.Module:
    """The model of a config with ``MODEL.WEIGHTS`` in it, on ``MODEL.DEVICE``, in evaluation mode.

    Where there is no GPU, ``cuda`` is the CPU, with a warning.

    Raises:
        BLPSegError: the weights are missing or of another model.
    """
    kind = cfg.MODEL.DEVICE.partition(":")[0]
    device = choose_device(kind)
    if device != kind:
        if kind == "cuda":
            logger.warning(f"MODEL.DEVICE {cfg.MODEL.DEVICE}: there is no GPU here, the CPU is used")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = device
    if not cfg.MODEL.WEIGHTS:
        raise BLPSegError("MODEL.WEIGHTS is empty; name the checkpoint to use, e.g. MODEL.WEIGHTS model_final.pth")
    model = build_model(cfg).eval()
    warn_of_classes(cfg, load_weights(model, cfg.MODEL.WEIGHTS, complete=True), cfg.MODEL.WEIGHTS)
    return model


def checkpoint_config(path: str, opts: Sequence = ()) -> tuple[CfgNode, list[str]]:
    """The config that a checkpoint of the Trainer's was trained with, and the names of its C classes, [] in old
    checkpoints.

    The checkpoint becomes ``MODEL.WEIGHTS``, data sets are registered where they are still to be had, ``MODEL.DEVICE``
    is "cpu" where there is no CUDA device, and ``opts`` change keys.

    Raises:
        BLPSegError: there is no config in the file, as in weights that were converted.
    """
    state = load_file(path)
    if not isinstance(state.get("config"), str):
        raise BLPSegError(f"{path}: holds no config; give the one it was trained with as --config-file")
    opts = ["MODEL.WEIGHTS", path, *opts]
    if not torch.cuda.is_available():
        opts = ["MODEL.DEVICE", "cpu", *opts]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(state["config"])
        file.flush()
        try:
            cfg = get_cfg(file.name, opts)
        except BLPSegError:  # the folder of the data set has moved; the checkpoint has the names of its classes
            cfg = get_cfg(file.name, [*opts, "DATASETS.FOLDER.NAME", ""])
    names = state.get("class_names")
    return cfg, [str(name) for name in names] if isinstance(names, list) else []


class Predictor:
    """A trained model to call on images. Detectron2 counterpart: :class:`detectron2.engine.DefaultPredictor`.

    Several threads may call one object: their forwards take turns, so memory stays that of one forward.
    Multi-scale inference, tiles and the CRF are as ``TEST.*`` of the config says.

    Example::

        predictor = Predictor(get_cfg("configs/CamVid-Scribble/blpseg_R50.yaml", ["MODEL.WEIGHTS", "model.pth"]))
        classes = predictor("street.png")["sem_seg"]
    """

    def __init__(self, cfg: CfgNode, *, return_logits: bool = True, batch_size: int = 4):
        """
        Args:
            cfg: ``MODEL.WEIGHTS`` is loaded, ``MODEL.DEVICE`` says where the model runs.
            return_logits: False leaves them out of the results, for images of many megapixels.
            batch_size: how many images of one size share a forward when a list is given.

        Raises:
            BLPSegError: see :func:`load_model`; or the CRF is asked for and its package is missing.
        """
        if not isinstance(cfg, CfgNode):
            raise BLPSegError(f"Predictor takes a config, as get_cfg(FILE) gives it, not {type(cfg).__name__} {cfg!r}")
        self.cfg = cfg.clone()
        self.model = load_model(self.cfg)
        self.return_logits = return_logits
        self.batch_size = batch_size
        self._crf = DenseCRF.from_config(cfg) if cfg.TEST.CRF.ENABLED else None
        self._inference = Inference.from_config(cfg, self.model, classes_only=self._crf is None and not return_logits)
        self._lock = threading.Lock()

    def __call__(self, images, *, annotation: bool = False) -> dict[str, np.ndarray] | list[dict[str, np.ndarray]]:
        """
        Args:
            images: one image or a list of them. An image is an (H, W, 3) uint8 array in BGR order (as OpenCV
                reads it), an (H, W) uint8 array of grey, a PIL image, or the path of a file. An
                (N, H, W, 3) array is a list.
            annotation: add the annotation head's view of the image.

        Returns:
            a dict for an image, a list of dicts for a list:

            * ``sem_seg``: (H, W) uint8 class map (int64 beyond 256 classes).
            * ``logits``: (C, H, W) float32, before the CRF; left out without ``return_logits``.
            * ``annotation_prob`` (with ``annotation``): (C + 1, H, W) float32, probability that a pixel is
              annotated as each class, and last "not annotated". It comes from a single view
              (:meth:`Inference.annotation_prob`).

        Raises:
            BLPSegError: an image cannot be read or is of another kind.
        """
        single = not isinstance(images, (list, tuple)) and not (isinstance(images, np.ndarray) and images.ndim == 4)
        items: Sequence = [images] if single else images
        results = []
        for start in range(0, len(items), self.batch_size):
            arrays = [self._to_array(item) for item in items[start : start + self.batch_size]]
            results += self._predict(arrays, annotation)
        return results[0] if single else results

    def _predict(self, arrays: list[np.ndarray], annotation: bool) -> list[dict[str, np.ndarray]]:
        batch = [{"image": torch.from_numpy(array).permute(2, 0, 1)} for array in arrays]
        # no_grad holds for this thread, the lock for the object.
        with self._lock, torch.no_grad():
            outputs = [output["sem_seg"].cpu() for output in self._inference(batch)]
            shown = batch if annotation else []
            probabilities = [self._inference.annotation_prob(x["image"], x["image"].shape[-2:]) for x in shown]
        results = []
        for i, (array, output) in enumerate(zip(arrays, outputs, strict=True)):
            result = {}
            if self._crf is not None:
                rgb = array if self.cfg.INPUT.FORMAT == "RGB" else array[..., ::-1]
                result["sem_seg"] = self._crf(output.numpy(), rgb)
            else:
                result["sem_seg"] = class_map(output).numpy()
            if self.return_logits:
                result["logits"] = output.numpy()
            if annotation:
                result["annotation_prob"] = probabilities[i].cpu().numpy()
            results.append(result)
        return results

    def _to_array(self, image) -> np.ndarray:
        """Any accepted image -> new (H, W, 3) uint8 in the order of INPUT.FORMAT."""
        order = self.cfg.INPUT.FORMAT
        if isinstance(image, (str, os.PathLike)):
            return read_image(os.fspath(image), order)
        if isinstance(image, Image.Image):
            array = np.array(ImageOps.exif_transpose(image).convert("RGB"))  # writable, as torch wants it
            return array if order == "RGB" else array[..., ::-1].copy()
        if not isinstance(image, np.ndarray):
            raise BLPSegError(f"an image must be a path, a PIL image or an array, not {type(image).__name__}")
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise BLPSegError(
                f"an image array must be (H, W, 3) or (H, W) uint8 in 0..255, not {image.shape} {image.dtype}"
            )
        if image.size == 0:
            raise BLPSegError(f"the image is empty: {image.shape}")
        if image.ndim == 2:
            return np.repeat(image[..., None], 3, axis=2)
        return (image[..., ::-1] if order == "RGB" else image).copy()
