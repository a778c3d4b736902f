"""The training loop: Detectron2's hooks and event storage around a step that can be stopped, repeated and replayed."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import TrainerBase
from detectron2.modeling import build_model
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from timm.layers import convert_sync_batchnorm  # torch's drops the activation in timm's norms
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import provenance
from ..utils.errors import BLPSegError
from .failures import Diagnosis, loader_error, save_dump
from .interrupt import StopRequest
from .launch import PeerFailure
from .optimizer import build_optimizer, clip_gradients, gradient_norm

__all__ = ["Trainer", "autocast_dtype", "seed_step"]

logger = logging.getLogger(__name__)

# Steps in a row that a gradient scaler may skip. It halves its scale at each, so by then nothing overflows: it is NaN.
MOST_SKIPPED_STEPS = 50


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Make the random numbers of a step a function of (seed, iteration, rank) alone.

    A resumed run then draws what an undisturbed one would, whatever was drawn (or not) in between by an
    evaluation or by starting loader workers; no generator's state has to be stored.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, iteration, rank)).generate_state(1, np.uint64)[0]))


def autocast_dtype(cfg: CfgNode, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision on ``device`` by ``SOLVER.AMP``; None for float32 throughout."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name = cfg.SOLVER.AMP.DTYPE
    if name not in ("float16", "bfloat16"):
        raise BLPSegError(f"config: SOLVER.AMP.DTYPE {name!r} is not float16 or bfloat16")
    if device.type != "cpu":
        return getattr(torch, name)
    if name == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    logger.info(f"mixed precision with {name} is not for this CPU: training in float32")
    return None


class Trainer(TrainerBase):
    """Trains a meta-architecture by config. Hooks are Detectron2's (:meth:`register_hooks`).

    Detectron2 counterpart: :class:`detectron2.engine.DefaultTrainer` with ``SimpleTrainer`` or ``AMPTrainer``.

    Attributes:
        model: the network, not wrapped.
        optimizer, scheduler, scaler: its optimiser, learning rate schedule and gradient scaler.
        batch: the images of the step under way, of this process.
    """

    def __init__(self, cfg: CfgNode, stop: StopRequest):
        """
        Args:
            cfg: SEED must be set (>= 0) and the same in every process.
            stop: where a signal asks the run to end.

        Raises:
            BLPSegError: settings that cannot work.
        """
        super().__init__()
        self.cfg = cfg
        self._config_text = cfg.dump()  # a third of a second
        self.stop = stop
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        self.images_per_process = _images_per_process(cfg, self.world_size)
        seed_all_rng(cfg.SEED)
        self.model = build_model(cfg)
        self.device = torch.device(cfg.MODEL.DEVICE)
        if self.world_size > 1 and self.device.type == "cuda":
            self.model = convert_sync_batchnorm(self.model)
        if cfg.SOLVER.CHANNELS_LAST:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.model.train()
        self.optimizer = build_optimizer(cfg, self.model)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.dtype = autocast_dtype(cfg, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.batch: list[dict] = []
        self.data_loader = None
        self._batches: Iterator[list[dict]] | None = None
        self._parallel: nn.Module = self.model
        self._votes = None
        self._skipped = 0  # steps in a row, for a gradient that was not finite

    # ------------------------------------------------------------------------------------------------- state
    def state(self) -> dict:
        """Everything that a run continues from, and what one needs to know about it: plain containers and tensors."""
        names = self.cfg.DATASETS.TRAIN or self.cfg.DATASETS.TEST
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.iter,
            "seed": self.cfg.SEED,
            "world_size": self.world_size,
            "config": self._config_text,
            "class_names": list(MetadataCatalog.get(names[0]).get("stuff_classes", [])) if names else [],
            "versions": provenance(),
        }

    def load_state(self, state: dict, path: str) -> None:
        """Continue after ``state["iteration"]``. The config, not the checkpoint, sets learning rate and decay.

        Raises:
            BLPSegError: the state is of another model.
        """
        try:
            self.model.load_state_dict(state["model"])
            own = self.optimizer.state_dict()
            counts = [[len(g["params"]) for g in s["param_groups"]] for s in (own, state["optimizer"])]
            if counts[0] != counts[1]:
                raise ValueError("the optimiser has other parameter groups")
            self.optimizer.load_state_dict({**own, "state": state["optimizer"]["state"]})
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise BLPSegError(
                f"{path}: does not fit this config ({str(error).splitlines()[-1].strip()}); resume with the "
                "config it was "
                "made with (config.yaml beside it), or train anew in another OUTPUT_DIR"
            ) from error
        self.start_iter = state["iteration"] + 1
        # Schedules here are functions of the iteration, so a longer MAX_ITER takes effect too.
        self.scheduler.last_epoch = self.start_iter
        if self.start_iter < self.max_iter:
            for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = lr
        if state["world_size"] != self.world_size:
            logger.warning(
                f"{path} is of {state['world_size']} process(es), this run has {self.world_size}: it continues, "
                "but not "
                "number for number"
            )

    # -------------------------------------------------------------------------------------------------- loop
    def build_train_loader(self, start_iter: int):
        """Batches of this process from iteration ``start_iter`` on; override for other data."""
        from ..data.build import build_train_loader

        return build_train_loader(self.cfg, start_iter=start_iter)

    def train(self) -> bool:
        """Run the iterations that are left; False if a signal ended it before the last one."""
        if self.cfg.SOLVER.COMPILE:
            for module in (self.model.backbone, getattr(self.model.sem_seg_head, "pixel_decoder", None)):
                if module is not None:
                    module.compile()
        if self.world_size > 1:
            gpus = [torch.cuda.current_device()] if self.device.type == "cuda" else None
            # Running statistics differ between processes with plain batch norm; rank 0's count (sync_buffers).
            self._parallel = DistributedDataParallel(self.model, device_ids=gpus, broadcast_buffers=False)
            self._votes = dist.new_group(backend="gloo")
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage, self.stop.deferred():
            try:
                if self.start_iter < self.max_iter:
                    self.data_loader = self.build_train_loader(self.start_iter)
                    self._batches = iter(self.data_loader)
                self.before_train()
                for iteration in range(self.start_iter, self.max_iter):
                    self.iter = iteration
                    self.before_step()
                    if not self.run_step():
                        self.iter -= 1  # the last one that is done
                        break
                    self.after_step()
            finally:
                self.after_train()
        return not self.stop.signum or self.iter + 1 >= self.max_iter

    def run_step(self) -> bool:
        """One optimiser step; False if the processes agreed to stop before it."""
        start = time.perf_counter()
        error = None
        try:
            if not self.stop.signum:
                self.batch = next(self._batches)
                # The handler that torch sets with the first batch raises for a dead loader worker wherever this
                # process is, mid-step too; the loader itself finds out, within 5 s, at the next batch.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except Exception as caught:
            error = caught
        data_time = time.perf_counter() - start
        parts = [] if error or self.stop.signum else _split(self.batch, self.cfg.SOLVER.ACCUMULATION_STEPS)
        weights = [self._loss_weights(part) for part in parts]
        go, totals = self._agree(error, weights)
        if not go:
            return False

        seed_step(self.cfg.SEED, self.iter, self.rank)
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, torch.Tensor] = {}
        with Diagnosis(self.cfg, self.images_per_process):
            for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
                quiet = self.world_size > 1 and k < len(parts) - 1  # gradients travel once, with the last part
                with self._parallel.no_sync() if quiet else contextlib.nullcontext():
                    with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                        part_losses = self._parallel(part)
                    # Each loss is a mean over something; its share of the whole batch's mean, times the number of
                    # processes since their gradients are averaged.
                    for name, loss in part_losses.items():
                        key = name if name in weight else "images"
                        part_losses[name] = loss * (self.world_size * weight[key] / totals[key])
                    self.scaler.scale(sum(part_losses.values())).backward()
                for name, loss in part_losses.items():
                    losses[name] = losses.get(name, 0) + loss.detach()
            self.scaler.unscale_(self.optimizer)
            norm = gradient_norm(self.parameters)
            names = [*losses, "grad_norm"]
            # The step's one wait for the GPU, while all of its work is queued.
            values = torch.stack([*(loss.double() for loss in losses.values()), norm.double()]).tolist()
            metrics = self._check_finite(dict(zip(names, values, strict=True)))
            clip_gradients(self.cfg.SOLVER.CLIP_GRADIENTS, self.parameters)
            self.scaler.step(self.optimizer)
            self.scaler.update()

        self.storage.put_scalars(
            total_loss=sum(v for k, v in metrics.items() if k != "grad_norm"),
            **{k: v for k, v in metrics.items() if math.isfinite(v)},
            data_time=data_time,
            time=time.perf_counter() - start,
        )
        self.storage.put_scalar("lr", self.optimizer.param_groups[0]["lr"], smoothing_hint=False)
        if self.iter + 1 < self.max_iter:
            self.scheduler.step()
        return True

    def _loss_weights(self, part: list[dict]) -> dict[str, float]:
        """How much each loss of ``part`` counts in the mean over a larger batch; "images" for losses without a say."""
        weights = {"images": float(len(part))}
        if hasattr(self.model, "loss_weights") and (self.world_size > 1 or len(part) < len(self.batch)):
            weights.update(self.model.loss_weights(part))
        return weights

    def _agree(self, error: Exception | None, weights: list[dict[str, float]]) -> tuple[bool, dict[str, float]]:
        """Whether every process has a batch and nobody was asked to stop; and the sums of the loss weights."""
        stop, failed = self.stop.signum, error is not None
        if self.world_size > 1:
            votes = torch.tensor([stop, failed])
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._votes)
            stop, failed = votes.tolist()
        if stop:
            self.stop.signum = stop  # a loader worker that the same signal ended is no failure
            return False, {}
        if error is not None:
            raise loader_error(error) from error
        if failed:
            raise PeerFailure("another process of this run has no batch; its message tells why")
        totals = {name: sum(weight[name] for weight in weights) for name in weights[0]}
        if self.world_size > 1:
            vector = torch.tensor(list(totals.values()), dtype=torch.float64)
            dist.all_reduce(vector, group=self._votes)
            totals = dict(zip(totals, vector.tolist(), strict=True))
        return True, {name: max(total, 1e-30) for name, total in totals.items()}

    def _check_finite(self, values: dict[str, float]) -> dict[str, float]:
        """Losses averaged over the processes.

        Raises:
            BLPSegError: a loss or a gradient is NaN or infinite, the latter in more steps in a row than a gradient
                scaler copes with. The weights are still those from before the step, and a dump of it lies in the
                output directory.
        """
        losses = {k: v for k, v in values.items() if k != "grad_norm"}
        culprits = [k for k, v in losses.items() if not math.isfinite(v)]
        self._skipped = 0 if math.isfinite(values["grad_norm"]) else self._skipped + 1
        if not culprits and self._skipped > (MOST_SKIPPED_STEPS if self.scaler.is_enabled() else 0):
            culprits = ["the gradient"]
        anywhere = bool(culprits)
        if self.world_size > 1:
            vector = torch.tensor([float(anywhere), *losses.values()], dtype=torch.float64)
            dist.all_reduce(vector, group=self._votes)
            anywhere = bool(vector[0])
            means = (vector[1:] / self.world_size).tolist()
            values = {**dict(zip(losses, means, strict=True)), "grad_norm": values["grad_norm"]}
        if culprits:
            path = save_dump(self, culprits)
            files = ", ".join(str(x.get("file_name", "?")) for x in self.batch)
            raise BLPSegError(
                f"iteration {self.iter}: {' and '.join(culprits)} became NaN or infinite on {files}; weights and "
                "batch are in "
                f"{path}, repeat the step with --replay {path}"
            )
        if anywhere:
            raise PeerFailure(f"iteration {self.iter}: a loss became NaN or infinite in another process")
        return values

    def sync_buffers(self) -> None:
        """Give every process rank 0's batch norm statistics, those that are saved."""
        if self.world_size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)


def _images_per_process(cfg: CfgNode, world_size: int) -> int:
    total, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    if total < 1 or total % world_size:
        raise BLPSegError(
            f"config: SOLVER.IMS_PER_BATCH {total} is the total over all processes and must be a multiple of "
            "their number, "
            f"{world_size}"
        )
    if not 1 <= steps <= total // world_size:
        raise BLPSegError(
            f"config: SOLVER.ACCUMULATION_STEPS {steps} must be from 1 to the images of a process, "
            f"{total // world_size}"
        )
    if cfg.SOLVER.MAX_ITER < 1:
        raise BLPSegError(f"config: SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} must be at least 1")
    return total // world_size


def _split(batch: list[dict], parts: int) -> list[list[dict]]:
    """``batch`` in ``parts`` runs whose lengths differ by at most one."""
    edges = [round(k * len(batch) / parts) for k in range(parts + 1)]
    return [batch[a:b] for a, b in zip(edges, edges[1:], strict=False)]
