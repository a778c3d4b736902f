"""Progress lines, scalars and pictures of a run."""

from __future__ import annotations

import datetime
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from ..utils.errors import BLPSegError
from .output_dir import open_to_append

logger = logging.getLogger(__name__)

LINE_SECONDS = 30.0


def default_writers(cfg: CfgNode, start_iter: int) -> list[EventWriter]:
    """Lines of progress, metrics.json, TensorBoard and, with ``OUTPUT.WANDB_PROJECT``, Weights & Biases."""
    folder, window = cfg.OUTPUT_DIR, cfg.OUTPUT.LOG_PERIOD
    writers = [
        ProgressWriter(cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, window),
        JsonWriter(os.path.join(folder, "metrics.json"), window),
        TensorBoardWriter(folder, window, start_iter),
    ]
    if cfg.OUTPUT.WANDB_PROJECT:
        writers.append(WandbWriter(cfg.OUTPUT.WANDB_PROJECT, dict(cfg), folder, window))
    return writers


class Writers(HookBase):
    """Calls the main process's event writers every ``period`` iterations, after the first and the last.

    Detectron2's ``PeriodicWriter``, but registered before the checkpoints: what the iterations before a checkpoint
    gave is on the disk first.
    """

    def __init__(self, build_writers: Callable[[], list[EventWriter]], period: int):
        """``build_writers`` is called in the main process when training starts, since writers open files."""
        self.build_writers = build_writers
        self.writers: list[EventWriter] = []
        self.period = period

    def before_train(self):
        if comm.is_main_process():
            self.writers = self.build_writers()

    def after_step(self):
        done = self.trainer.iter + 1
        due = done % self.period == 0 or done in (self.trainer.start_iter + 1, self.trainer.max_iter)
        for writer in self.writers:
            if due or isinstance(writer, ProgressWriter) and writer.quiet_for > LINE_SECONDS:
                writer.write()

    def write_scalars(self) -> None:
        """Write new scalars, such as those of an evaluation, without a line of progress."""
        for writer in self.writers:
            if isinstance(writer, ScalarWriter):
                writer.write()

    def after_train(self):
        failing = sys.exc_info()[0] is not None
        try:
            self.write_scalars()
            for writer in self.writers:
                writer.close()
        except OSError:
            if not failing:
                raise  # otherwise the error under way is the one to report


class ScalarWriter(EventWriter):
    """Base of writers that record every scalar once. Detectron2's skip those of an iteration that comes late, as an
    evaluation's do."""

    def __init__(self, window: int):
        """``window``: iterations that noisy scalars are smoothed over (median), as Detectron2's writers do."""
        self._window = window
        self._last: dict[str, int] = {}

    def new_scalars(self) -> dict[int, dict[str, float]]:
        """{iteration: {name: value}} of the scalars since the last call."""
        result: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window).items():
            if iteration > self._last.get(name, -1):
                self._last[name] = iteration
                result.setdefault(iteration, {})[name] = value
        return dict(sorted(result.items()))


class JsonWriter(ScalarWriter):
    """Scalars as a line of JSON an iteration, on the disk when :meth:`write` returns."""

    def __init__(self, path: str, window: int):
        super().__init__(window)
        self._path = path
        self._file = open_to_append(path)

    def write(self) -> None:
        lines = [json.dumps({**scalars, "iteration": k}, sort_keys=True) for k, scalars in self.new_scalars().items()]
        if not lines:
            return
        try:
            self._file.write("".join(line + "\n" for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"{self._path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter(ScalarWriter):
    """Scalars and pictures for TensorBoard; points of iterations that are run again replace the earlier ones."""

    def __init__(self, output_dir: str, window: int, start_iter: int):
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(window)
        self._output_dir = output_dir
        threading.excepthook = _quiet_about_tensorboard
        self._writer = SummaryWriter(output_dir, purge_step=start_iter or None)

    def write(self) -> None:
        storage = get_event_storage()
        try:
            for iteration, scalars in self.new_scalars().items():
                for name, value in scalars.items():
                    self._writer.add_scalar(name, value, iteration)
            for name, image, iteration in storage._vis_data:  # Detectron2 offers its TensorBoard writer no other way
                self._writer.add_image(name, image, iteration)
            storage.clear_images()
            self._writer.flush()
        except OSError as error:
            path = os.path.join(self._output_dir, "events.out.tfevents")
            raise OSError(error.errno, f"{path}...: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        self._writer.close()


def _quiet_about_tensorboard(args) -> None:
    """TensorBoard writes in a thread, which raises its errors at the next call; the thread's own traceback is noise."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


class ProgressWriter(EventWriter):
    """One line a period, and after half a minute without one: losses, learning rate, images/s, share of the time spent
    waiting for data, memory, time left."""

    def __init__(self, max_iter: int, images: int, window: int):
        """``images``: of a step, over all processes. ``window``: iterations that figures are averaged over."""
        self.max_iter, self.images, self.window = max_iter, images, window
        self._first: int | None = None  # iteration of the first line
        self._last = time.monotonic()

    @property
    def quiet_for(self) -> float:
        """Seconds since the last line."""
        return time.monotonic() - self._last

    def write(self) -> None:
        storage = get_event_storage()
        histories = storage.histories()
        self._last, done = time.monotonic(), storage.iter + 1
        first = self._first = done if self._first is None else self._first

        def mean(name: str) -> float:
            after = storage.iter - self.window
            if name.endswith("time") and done > first:  # a run's first iteration takes several times as long
                after = max(after, first - 1)
            values = [value for value, k in histories[name].values()[-self.window :] if k > after]
            return sum(values) / len(values)

        seconds = mean("time")
        names = sorted(k for k in histories if k.startswith("loss_"))
        losses = " ".join(f"{name.removeprefix('loss_')} {mean(name):.4g}" for name in names)
        left = datetime.timedelta(seconds=round(seconds * (self.max_iter - done)))
        left = "?" if done == first < self.max_iter else left
        logger.info(
            f"iter {done}/{self.max_iter} loss {mean('total_loss'):.4g} ({losses}) "
            f"lr {storage.latest()['lr'][0]:.3g} {self.images / seconds:.3g} images/s "
            f"data {mean('data_time') / seconds:.0%} mem {memory_gib():.2f} GiB eta {left}"
        )


def memory_gib() -> float:
    """Peak memory of this process in GiB: the GPU's, or the resident set if it uses none."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class WandbWriter(ScalarWriter):
    """Sends every scalar to Weights & Biases."""

    def __init__(self, project: str, config: dict, output_dir: str, window: int):
        """
        Raises:
            BLPSegError: the package ``wandb`` is not installed.
        """
        super().__init__(window)
        try:
            import wandb
        except ImportError:
            raise BLPSegError("OUTPUT.WANDB_PROJECT is set, but wandb is missing: pip install wandb") from None
        self._run = wandb.init(project=project, config=config, dir=output_dir)

    def write(self) -> None:
        # W&B's own step only grows; a resumed run and late evaluations need the iteration as a value of its own.
        for iteration, scalars in self.new_scalars().items():
            self._run.log({**scalars, "iteration": iteration})

    def close(self) -> None:
        self._run.finish()
