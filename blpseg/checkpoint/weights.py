"""Loading the weights of a file into a model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import nn

from ..utils.errors import BLPSegError, describe
from ..utils.state_dict import current_name
from ..utils.weights_files import check_finite, load_file, state_dict_of

logger = logging.getLogger(__name__)


def load_weights(
    model: nn.Module, path: str, *, complete: bool, other_classes: bool = False, trust: bool = False
) -> dict:
    """Load ``MODEL.WEIGHTS`` into ``model``; what else the file holds is returned.

    Names that do not start at the model's root (a backbone file: ``stem.conv1.weight``, ``res2...``, also in
    Caffe2's spelling) are matched to it as Detectron2's ``DetectionCheckpointer`` does.

    Args:
        model: on any device, not wrapped.
        path: anything PathManager opens, see :func:`load_file`.
        complete: every parameter but those of losses must be in the file (evaluation); otherwise a whole backbone is
            enough.
        other_classes: weights whose shape differs keep their initial values instead of being refused.
        trust: see :func:`load_file`.

    Returns:
        what :func:`load_file` returns.

    Raises:
        BLPSegError: the file does not fit; the message names the config key that would make it fit.
    """
    data = load_file(path, trust=trust)
    weights = state_dict_of(data, path)
    own = model.state_dict()
    weights = {k if k in own else current_name(k): v for k, v in weights.items()}
    if not any(name in own for name in weights):
        weights = _matched_by_detectron2(own, weights, data, path)
    wrong = {k: v.shape for k, v in weights.items() if k in own and v.shape != own[k].shape}
    if wrong and not other_classes:
        raise BLPSegError(f"{path}: {_shape_message(model, wrong, complete)}")
    loaded = {k: v for k, v in weights.items() if k in own and k not in wrong}
    if not loaded:
        raise BLPSegError(f"{path}: none of its {len(weights)} weights fits this model; is it the right file?")
    missing = [k for k in own if k not in loaded and not k.endswith("num_batches_tracked")]
    # Layers that a backbone adds to its pretrained network are in no file of the latter.
    added = tuple(f"backbone.{k}" for k in getattr(getattr(model, "backbone", None), "new_weights", ()))
    backbone = [k for k in missing if k.startswith("backbone.") and not k.startswith(added)]
    predicting = [k for k in missing if not k.startswith("losses.")]  # a mean teacher is for training
    needed = [k for k in (predicting if complete else backbone) if k not in wrong]
    if needed:
        raise BLPSegError(
            f"{path}: lacks {len(needed)} of the model's weights ({needed[0]}, ...); "
            + (
                "do MODEL.RESNETS.DEPTH and STEM_TYPE fit the file?"
                if needed[0].startswith("backbone.")
                else "evaluation needs the checkpoint of a trained model, made with this config"
            )
        )
    check_finite(path, loaded)
    model.load_state_dict(loaded, strict=False)
    extra = len([k for k in weights if k not in own])
    logger.info(
        f"{path}: loaded {len(loaded)} weights; {len(missing)} of the model keep their initial values"
        + (f"; {extra} have no place in the model" if extra else "")
    )
    return data


def _matched_by_detectron2(own: dict, weights: dict, data: dict, path: str) -> dict:
    """``weights`` of a backbone's file under the names of ``own``, the model's state dict."""
    caffe2 = path.partition("#")[0].endswith(".pkl") and "__author__" not in data or data.get("__author__") == "Caffe2"
    try:
        with _quiet("detectron2.checkpoint.c2_model_loading"):
            return align_and_update_state_dicts(own, weights, c2_conversion=caffe2)
    except Exception as error:  # the matching of names is Detectron2's, and made for its own files
        raise BLPSegError(f"{path}: its names cannot be matched to this model's ({describe(error)[:120]})") from error


def _shape_message(model: nn.Module, wrong: dict[str, torch.Size], complete: bool) -> str:
    name, shape = next(iter(wrong.items()))
    own = model.state_dict()
    heads = ("sem_seg_head.predictor.", "sem_seg_head.annotation_head.")
    if all(k.startswith(heads) for k in wrong):
        for k, found in wrong.items():
            if k.startswith(heads[0]) and found:
                anew = ", or start the class layers anew with MODEL.BLPSEG.RESET_CLASS_LAYERS True"
                return (
                    f"made for {found[0]} classes, the config has MODEL.SEM_SEG_HEAD.NUM_CLASSES {own[k].shape[0]}; "
                    f"set it to {found[0]}" + anew * (not complete)
                )
    return (
        f"{len(wrong)} weights have another shape than the model's ({name}: {tuple(shape)} in the file, "
        f"{tuple(own[name].shape)} in the model); use the config it was made with"
    )


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Detectron2's matching prints a table of every weight; one line of ours replaces it."""
    chatty = logging.getLogger(name)
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chatty.setLevel(level)
