"""One optimiser step: of a batch in parts, of several processes, in mixed precision; refused if it is not finite."""

from __future__ import annotations

import contextlib
import math
import signal
import time

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data.build import images_per_process
from ..utils.errors import BLPSegError
from .agreement import PeerFailure
from .amp import autocast_dtype
from .failures import explain_failure, loader_error
from .interrupt import StopRequest
from .nan_dump import save_dump
from .optimizer import gradient_norm
from .resume import seed_step

# Steps in a row that a gradient scaler may skip. It halves its scale at each, so by then nothing overflows: it is NaN.
MOST_SKIPPED_STEPS = 50


class StopTraining(Exception):
    """The processes agreed to stop before this step, because one of them was asked to."""


class TrainingStep(SimpleTrainer):
    """Detectron2 counterparts: :class:`detectron2.engine.SimpleTrainer` and ``AMPTrainer``.

    Attributes:
        model: the network, not wrapped.
        optimizer, scaler: its optimiser and gradient scaler.
        batch: the images of the step under way, of this process.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer, stop: StopRequest):
        """
        Args:
            cfg: SEED must be set (>= 0) and the same in every process.
            model: returns a dict of losses in training. Its method ``loss_weights(batched_inputs)``, if it has one,
                gives the number that each loss is a mean over; losses that it does not name are means over images.
            optimizer: over the model's parameters.
            stop: where a signal asks the run to end.
        """
        super().__init__(model, None, optimizer)
        self.cfg, self.stop = cfg, stop
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        self.images_per_process = images_per_process(cfg, self.world_size)
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.dtype = autocast_dtype(cfg, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.batch: list[dict] = []
        self._parallel: nn.Module = model
        self._votes = None  # a gloo group: votes must not wait for the GPU
        self._skipped = 0  # steps in a row whose gradient was not finite

    def connect(self) -> None:
        """Let the processes average their gradients. All start with the main process's weights."""
        if self.world_size > 1 and self._votes is None:
            gpus = [torch.cuda.current_device()] if self.device.type == "cuda" else None
            # Running statistics differ between processes with plain batch norm; rank 0's count (sync_buffers).
            self._parallel = DistributedDataParallel(self.model, device_ids=gpus, broadcast_buffers=False)
            self._votes = dist.new_group(backend="gloo")

    def sync_buffers(self) -> None:
        """Give every process rank 0's batch norm statistics, which are the ones that are saved."""
        if self.world_size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def run_step(self) -> None:
        """
        Raises:
            StopTraining: a process was asked to stop; nothing was computed.
            BLPSegError: there is no batch, memory ran out, or the step is not finite.
        """
        start = time.perf_counter()
        error = self._fetch()
        data_time = time.perf_counter() - start
        parts = [] if error or self.stop.signum else _split(self.batch, self.cfg.SOLVER.ACCUMULATION_STEPS)
        weights = [self._loss_weights(part) for part in parts]
        totals = self._agree(error, weights)
        seed_step(self.cfg.SEED, self.iter, self.rank)
        with explain_failure(self.cfg, self.images_per_process):
            losses = self._backward(parts, weights, totals)
            self.scaler.unscale_(self.optimizer)
            values = torch.stack([*losses.values(), gradient_norm(self.parameters).double()])
            # The step's one wait for the GPU, while all of its work is queued.
            metrics = dict(zip([*losses, "grad_norm"], values.tolist(), strict=True))
            metrics = self._check_finite(metrics)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        get_event_storage().put_scalars(
            total_loss=sum(v for k, v in metrics.items() if k != "grad_norm"),
            **{k: v for k, v in metrics.items() if math.isfinite(v)},
            data_time=data_time,
            time=time.perf_counter() - start,
        )

    def _fetch(self) -> Exception | None:
        """Put the next batch into ``self.batch``; returns what failed, if anything."""
        if self.stop.signum:
            return None
        try:
            self.batch = next(self._data_loader_iter)
        except Exception as error:
            return error
        # The handler that torch sets with the first batch raises for a dead loader worker wherever this process is,
        # mid-step too; the loader itself finds out, within 5 s, at the next batch.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return None

    def _loss_weights(self, part: list[dict]) -> dict[str, float]:
        """How much each loss of ``part`` counts in the mean over a larger batch; "images" for all other losses."""
        weights = {"images": float(len(part))}
        if hasattr(self.model, "loss_weights") and (self.world_size > 1 or len(part) < len(self.batch)):
            weights.update(self.model.loss_weights(part))
        return weights

    def _agree(self, error: Exception | None, weights: list[dict[str, float]]) -> dict[str, float]:
        """The sums of the loss weights over parts and processes, when every process has a batch and none must stop."""
        stop, failed = self.stop.signum, error is not None
        if self.world_size > 1:
            votes = torch.tensor([stop, failed])
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._votes)
            stop, failed = votes.tolist()
        if stop:
            self.stop.signum = stop  # a loader worker that the same signal ended is no failure
            raise StopTraining
        if error is not None:
            raise loader_error(error) from error
        if failed:
            raise PeerFailure("another process of this run has no batch; its message says why")
        totals = {name: sum(weight[name] for weight in weights) for name in weights[0]}
        if self.world_size > 1:
            vector = torch.tensor(list(totals.values()), dtype=torch.float64)
            dist.all_reduce(vector, group=self._votes)
            totals = dict(zip(totals, vector.tolist(), strict=True))
        return {name: max(total, 1e-30) for name, total in totals.items()}

    def _backward(self, parts: list, weights: list[dict], totals: dict[str, float]) -> dict[str, torch.Tensor]:
        """Forward and backward of all parts; each loss of the whole batch, detached, float64."""
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, torch.Tensor] = {}
        for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            last = k == len(parts) - 1
            # Gradients of several parts are summed here and exchanged with the other processes once.
            exchange = contextlib.nullcontext() if last or self.world_size == 1 else self._parallel.no_sync()
            with exchange:
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    part_losses = self._parallel(part)
                # Each loss is a mean over something; its share of the whole batch's mean, times the number of
                # processes since their gradients are averaged.
                for name, loss in part_losses.items():
                    key = name if name in weight else "images"
                    part_losses[name] = loss * (self.world_size * weight[key] / totals[key])
                self.scaler.scale(sum(part_losses.values())).backward()
            for name, loss in part_losses.items():
                losses[name] = losses.get(name, 0) + loss.detach().double()
        return losses

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
                f"iteration {self.iter}: {' and '.join(culprits)} became NaN or infinite on {files}; weights and batch "
                f"are in {path}, repeat the step with --replay {path}"
            )
        if anywhere:
            raise PeerFailure(f"iteration {self.iter}: a loss became NaN or infinite in another process")
        return values


def _split(batch: list[dict], parts: int) -> list[list[dict]]:
    """``batch`` in ``parts`` runs whose lengths differ by at most one."""
    edges = [round(k * len(batch) / parts) for k in range(parts + 1)]
    return [batch[a:b] for a, b in zip(edges, edges[1:], strict=False)]
