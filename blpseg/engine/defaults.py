"""What a training script does before it builds a Trainer."""

from __future__ import annotations

import argparse
import logging

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data.datasets import register_folder
from ..utils.errors import BLPSegError
from .output_dir import claim_output_dir, setup_logging

__all__ = ["announce", "choose_device", "default_setup"]

logger = logging.getLogger(__name__)


def choose_device(wanted: str) -> str:
    """``cuda`` or ``cpu`` for MODEL.DEVICE ``wanted``: the CPU where there is no GPU.

    Raises:
        BLPSegError: a GPU is asked for by its number.
    """
    if wanted.startswith("cuda:") and wanted != "cuda:0":
        raise BLPSegError(
            f"MODEL.DEVICE {wanted}: processes take GPUs by their rank; write cuda, and choose the GPUs with "
            f"CUDA_VISIBLE_DEVICES={wanted[5:]}"
        )
    if wanted.startswith("cuda"):
        # A process has one GPU, chosen by its rank.
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Prepare this process of a run: the device, the output directory and the log.

    Detectron2 counterpart: :func:`detectron2.engine.default_setup`. A :class:`Trainer` does without it, but then
    results in OUTPUT_DIR cannot be overwritten, and evaluations are not logged.

    Args:
        cfg: the config; its MODEL.DEVICE is made to fit this machine.
        args: of :func:`blpseg.engine.argument_parser` or Detectron2's ``default_argument_parser``.

    Raises:
        BLPSegError: see :func:`claim_output_dir` and :func:`choose_device`.
    """
    register_folder(cfg)  # a spawned process has catalogs of its own
    device = choose_device(cfg.MODEL.DEVICE)
    if getattr(args, "eval_only", False):
        setup_logging(cfg.OUTPUT_DIR, comm.get_rank())
    elif getattr(args, "replay", ""):
        setup_logging("", comm.get_rank())
    else:
        claim_output_dir(cfg, resume=args.resume, overwrite=getattr(args, "overwrite", False))
    announce(cfg.MODEL.DEVICE, device)
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    if frozen:
        cfg.freeze()


def announce(wanted: str, device: str) -> None:
    """Log what this run computes on."""
    logger.info(
        f"{comm.get_world_size()} process(es) on {device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s) each"
    )
    if wanted != device and device == "cpu":
        logger.warning(f"MODEL.DEVICE {wanted}: there is no GPU here, the CPU is used")
