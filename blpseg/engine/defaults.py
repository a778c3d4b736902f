"""What a training script does before it builds a Trainer."""

from __future__ import annotations

import argparse
import logging
import os

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data.datasets import register_datasets
from ..utils.device import choose_device
from ..utils.threads import allowed_cpus, busy_cpus, choose_threads
from .output_dir import claim_output_dir, setup_logging

logger = logging.getLogger(__name__)


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
    register_datasets(cfg)  # a spawned process has catalogs of its own
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
    """Take this process's share of the free CPUs, unless OMP_NUM_THREADS is set, and log what the run computes on."""
    why = "OMP_NUM_THREADS"
    if why not in os.environ:
        cpus, busy = allowed_cpus(), busy_cpus()
        threads = choose_threads(comm.get_local_size(), cpus, busy)
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        why = f"of {cpus:g} CPUs, {busy:.1f} busy"
    name = f"cuda ({torch.cuda.get_device_name()})" if device == "cuda" else device
    logger.info(
        f"{comm.get_world_size()} process(es) on {name}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s) each ({why})"
    )
    if wanted != device and device == "cpu":
        chosen = "no GPU here" if wanted == "auto" else f"MODEL.DEVICE {wanted}: there is no GPU here"
        logger.warning(f"{chosen}, the CPU is used")
