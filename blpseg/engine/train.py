"""The jobs behind ``tools/train_net.py``: train, evaluate, replay."""

from __future__ import annotations

import logging
import os
import sys

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm

from .. import get_cfg
from ..checkpoint import Checkpointer, load_file, load_weights
from ..utils.errors import BLPSegError, describe
from .hooks import CheckpointAndEvaluate, JsonWriter, ProgressWriter, TensorBoardWriter, WandbWriter, Writers
from .interrupt import StopRequest
from .launch import PeerFailure, launch
from .output_dir import OutputDir, changed_keys, setup_logging
from .trainer import Trainer
from .watch import WatchImages

__all__ = ["run"]

logger = logging.getLogger(__name__)


def run(args) -> int:
    """Do what ``tools/train_net.py``'s parsed command line asks for, in as many processes; the exit status."""
    cfg, _ = _config(args)  # mistakes in it are told before any process starts
    return launch(_worker, args, use_gpu=cfg.MODEL.DEVICE.startswith("cuda"))


def _config(args) -> tuple[CfgNode, str]:
    """The config, its MODEL.DEVICE made to fit this machine, and the device it asked for."""
    cfg = get_cfg(args.config_file, args.opts)
    wanted = cfg.MODEL.DEVICE
    if wanted.startswith("cuda:") and wanted != "cuda:0":
        raise BLPSegError(
            f"MODEL.DEVICE {wanted}: processes take GPUs by their rank; write cuda, and choose the GPUs with "
            f"CUDA_VISIBLE_DEVICES={wanted[5:]}"
        )
    if cfg.MODEL.DEVICE.startswith("cuda"):
        # A process has one GPU, chosen by its rank.
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg, wanted


def _worker(args, stop: StopRequest) -> int:
    cfg, wanted = _config(args)
    if args.replay:
        from .replay import replay

        setup_logging("", comm.get_rank())
        return replay(args.replay, device=cfg.MODEL.DEVICE)
    job = _evaluate if args.eval_only else _train
    return job(cfg, args, stop, wanted)


def _start_logging(cfg: CfgNode, wanted_device: str) -> None:
    setup_logging(cfg.OUTPUT_DIR, comm.get_rank())
    logger.info(
        f"{comm.get_world_size()} process(es) on {cfg.MODEL.DEVICE}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s) each"
    )
    if wanted_device != cfg.MODEL.DEVICE and cfg.MODEL.DEVICE == "cpu":
        logger.warning(f"MODEL.DEVICE {wanted_device}: there is no GPU here, the CPU is used")


def _on_main(function):
    """Call ``function`` in the main process; its failure ends the others too, quietly. Its result, or None."""
    result = error = None
    if comm.is_main_process():
        try:
            result = function()
        except (BLPSegError, OSError) as caught:
            error = caught
    failed = comm.all_gather(error is not None)[0]
    if error is not None:
        raise error
    if failed:
        raise PeerFailure("the main process failed; its message tells why")
    return result


def _train(cfg: CfgNode, args, stop: StopRequest, wanted_device: str) -> int:
    output = OutputDir(cfg)
    _on_main(lambda: output.claim(resume=args.resume, overwrite=args.overwrite))
    _start_logging(cfg, wanted_device)
    checkpointer = Checkpointer(cfg.OUTPUT_DIR, cfg.OUTPUT.KEEP_CHECKPOINTS)
    path, state = _find_checkpoint(checkpointer, args) if args.resume else (None, None)
    if cfg.SEED < 0:
        cfg.SEED = state["seed"] if state else comm.shared_random_seed() % 2**31
    cfg.freeze()
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    output.cfg = cfg
    trainer = Trainer(cfg, stop)
    if state:
        trainer.load_state(state, path)
        changes = changed_keys(state["config"], cfg)
        if changes:
            logger.warning(f"the config differs from the checkpoint's: {'; '.join(changes)}")
        logger.info(f"{path}: continuing after iteration {state['iteration']}")
    elif cfg.MODEL.WEIGHTS:
        load_weights(
            trainer.model,
            cfg.MODEL.WEIGHTS,
            complete=False,
            other_classes=cfg.MODEL.BLPSEG.RESET_CLASS_LAYERS,
            trust=args.trust_checkpoint,
        )
    del state  # its tensors would otherwise stay in memory beside the optimiser's
    start = trainer.start_iter
    _on_main(lambda: output.start(start))
    writers = Writers([], cfg.OUTPUT.LOG_PERIOD)
    if comm.is_main_process():
        if cfg.OUTPUT.PANEL_PERIOD > 0 and cfg.OUTPUT.PANEL_IMAGES > 0:
            trainer.register_hooks([WatchImages(cfg)])
        window = cfg.OUTPUT.LOG_PERIOD
        writers.writers = [
            ProgressWriter(cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, window),
            JsonWriter(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), window),
            TensorBoardWriter(cfg.OUTPUT_DIR, window, start),
        ]
        if cfg.OUTPUT.WANDB_PROJECT:
            writers.writers.append(WandbWriter(cfg.OUTPUT.WANDB_PROJECT, dict(cfg), cfg.OUTPUT_DIR, window))
    evaluation = CheckpointAndEvaluate(checkpointer, lambda: _test(cfg, trainer.model), writers.write_scalars)
    trainer.register_hooks([writers, evaluation])
    if trainer.train():
        return 0
    if comm.is_main_process():
        print(
            f"interrupted after iteration {trainer.iter}: saved in {cfg.OUTPUT_DIR}; go on with --resume",
            file=sys.stderr,
            flush=True,
        )
    return stop.status


def _find_checkpoint(checkpointer: Checkpointer, args) -> tuple[str, dict] | tuple[None, None]:
    """The newest readable checkpoint, the same in every process; (None, None) if there is none at all."""

    def newest():
        if not checkpointer.iterations():
            logger.info(f"{checkpointer.output_dir}: nothing to resume, training from the start")
            return None
        found = next(checkpointer.readable(trust=args.trust_checkpoint), None)
        if found is None:
            raise BLPSegError(
                f"{checkpointer.output_dir}: none of its checkpoints can be read; restore one, or start anew with "
                "--overwrite"
            )
        return found

    found = _on_main(newest)
    path = comm.all_gather(found and found[0])[0]
    if path is None:
        return None, None
    if found is None:
        try:
            found = path, load_file(path, trust=args.trust_checkpoint)
        except BLPSegError as error:
            raise BLPSegError(f"OUTPUT_DIR must be visible from every machine: {describe(error)}") from error
    return found


def _evaluate(cfg: CfgNode, args, stop: StopRequest, wanted_device: str) -> int:
    _start_logging(cfg, wanted_device)
    model = build_model(cfg)
    path = cfg.MODEL.WEIGHTS
    if args.resume:
        path, state = _find_checkpoint(Checkpointer(cfg.OUTPUT_DIR, 1), args)
        del state
    if not path:
        raise BLPSegError(
            "--eval-only needs MODEL.WEIGHTS, e.g. MODEL.WEIGHTS output/.../model_final.pth, or --resume for the "
            "newest "
            "checkpoint in OUTPUT_DIR"
        )
    load_weights(model, path, complete=True, trust=args.trust_checkpoint)
    cfg.freeze()
    if not cfg.DATASETS.TEST:
        raise BLPSegError("config: DATASETS.TEST is empty; name a data set to evaluate on")
    _test(cfg, model)
    return 0


def _test(cfg: CfgNode, model):
    from ..evaluation import evaluate

    # Trying algorithms out pays in training, where sizes stay the same.
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        return evaluate(cfg, model)
    finally:
        torch.backends.cudnn.benchmark = benchmark
