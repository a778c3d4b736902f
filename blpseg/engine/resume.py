"""The state in a checkpoint, and continuing from it: a resumed run ends with the weights of an undisturbed one."""

from __future__ import annotations

import logging
import os
import warnings

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ..checkpoint import Checkpointer, load_file, load_weights, provenance
from ..data.datasets.trained import class_names, warn_of_classes, warn_of_seen
from ..utils.errors import BLPSegError, describe
from ..utils.threads import allowed_cpus
from ..utils.yaml_files import parse_yaml
from .agreement import on_main
from .output_dir import changed_keys

logger = logging.getLogger(__name__)


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Make the random numbers of a step a function of (seed, iteration, rank) alone.

    A resumed run then draws what an undisturbed one would, whatever an evaluation or the start of loader workers
    drew in between; no generator's state has to be stored.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, iteration, rank)).generate_state(1, np.uint64)[0]))


def training_state(trainer) -> dict:
    """Everything that a run needs to continue, and its provenance: plain containers and tensors."""
    cfg = trainer.cfg
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "iteration": trainer.iter,
        "seed": cfg.SEED,
        "world_size": comm.get_world_size(),
        "threads": torch.get_num_threads(),
        "config": trainer.config_text,
        "class_names": class_names(cfg),
        "versions": provenance(),
    }


def load_state(trainer, state: dict, path: str) -> None:
    """Continue after ``state["iteration"]``. The config, not the checkpoint, sets learning rate and decay.

    Raises:
        BLPSegError: the state is of another model.
    """
    optimizer = trainer.optimizer
    try:
        trainer.model.load_state_dict(state["model"])
        own = optimizer.state_dict()
        counts = [[len(g["params"]) for g in s["param_groups"]] for s in (own, state["optimizer"])]
        if counts[0] != counts[1]:
            raise ValueError("the optimiser has other parameter groups")
        optimizer.load_state_dict({**own, "state": state["optimizer"]["state"]})
        if trainer.scaler.is_enabled() and state["scaler"]:
            trainer.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BLPSegError(
            f"{path}: does not fit this config ({str(error).splitlines()[-1].strip()}); resume with the config it was "
            "made with (config.yaml beside it), or train anew in another OUTPUT_DIR"
        ) from error
    trainer.start_iter = state["iteration"] + 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step")  # before any optimizer.step()
        # Repeated rather than restored, so that a longer SOLVER.MAX_ITER or another rate takes effect.
        for _ in range(min(trainer.start_iter, trainer.max_iter)):
            trainer.scheduler.step()
    threads = state.get("threads", torch.get_num_threads())
    if "OMP_NUM_THREADS" not in os.environ and threads != torch.get_num_threads() and threads <= allowed_cpus():
        torch.set_num_threads(threads)  # another number would add up in another order
        logger.info(f"{threads} thread(s) each, as before")
    if state["world_size"] != comm.get_world_size():
        logger.warning(
            f"{path} is of {state['world_size']} process(es), this run has {comm.get_world_size()}: it continues, but "
            "not number for number"
        )
    if changes := changed_keys(state["config"], trainer.cfg, path):
        logger.warning(f"the config differs from the checkpoint's: {'; '.join(changes)}")
    logger.info(f"{path}: continuing after iteration {state['iteration']}")
    if trainer.start_iter >= trainer.max_iter:
        logger.warning(f"SOLVER.MAX_ITER {trainer.max_iter} is reached; raise it, or train anew with --overwrite")


def find_checkpoint(checkpointer: Checkpointer, *, trust: bool = False) -> tuple[str, dict] | None:
    """Path and state of the newest readable checkpoint, the same in every process; None if there is none at all.

    Raises:
        BLPSegError: there are checkpoints, but none can be read.
    """
    folder = checkpointer.output_dir

    def newest():
        if not checkpointer.iterations():
            logger.info(f"{folder}: nothing to resume, training from the start")
            return None
        found = next(checkpointer.readable(trust=trust), None)
        if found is None:
            raise BLPSegError(
                f"{folder}: none of its checkpoints can be read; restore one, or start anew with --overwrite"
            )
        return found

    found = on_main(newest)
    path = comm.all_gather(found and found[0])[0]
    if found or path is None:
        return found
    try:
        return path, load_file(path, trust=trust)
    except BLPSegError as error:
        raise BLPSegError(f"OUTPUT_DIR must be visible from every machine: {describe(error)}") from error


def load_trained(cfg: CfgNode, model: nn.Module, *, resume: bool = False, trust: bool = False) -> None:
    """Load the weights to evaluate: MODEL.WEIGHTS, or with ``resume`` the newest checkpoint in OUTPUT_DIR.

    Raises:
        BLPSegError: neither is there, or the file does not fit the model.
    """
    found = find_checkpoint(Checkpointer(cfg.OUTPUT_DIR, 1), trust=trust) if resume else None
    path = found[0] if found else cfg.MODEL.WEIGHTS
    if not path:
        raise BLPSegError(
            "--eval-only needs MODEL.WEIGHTS, e.g. MODEL.WEIGHTS output/.../model_final.pth, or --resume for the "
            "newest checkpoint in OUTPUT_DIR"
        )
    data = load_weights(model, path, complete=True, trust=trust)
    warn_of_classes(cfg, data, path)
    config = parse_yaml(data["config"], path) if isinstance(data.get("config"), str) else None
    if isinstance(config, dict):  # files of others hold none
        warn_of_seen(cfg, config)
