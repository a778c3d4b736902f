"""What happens between steps: checkpoints, evaluation, the lines and pictures to watch a run by."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import resource
import sys
import threading
from collections.abc import Callable

import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.file_io import PathManager
from torch.utils.tensorboard import SummaryWriter

from ..checkpoint import Checkpointer, write_atomic
from ..utils.errors import BLPSegError
from ..utils.files import without_nan

__all__ = [
    "CheckpointAndEvaluate",
    "JsonWriter",
    "ProgressWriter",
    "ScalarWriter",
    "TensorBoardWriter",
    "WandbWriter",
    "Writers",
]

logger = logging.getLogger(__name__)


class CheckpointAndEvaluate(HookBase):
    """Saves every ``SOLVER.CHECKPOINT_PERIOD`` iterations, evaluates every ``TEST.EVAL_PERIOD``, and both at the end.

    A checkpoint precedes each evaluation; a run that is killed while it evaluates repeats the evaluation when it
    is resumed. ``evaluations.json`` lists the results, ``model_best.pth`` is the checkpoint of the highest mIoU on
    the first data set of ``DATASETS.TEST``.
    """

    def __init__(self, checkpointer: Checkpointer, evaluate: Callable[[], dict], record: Callable[[], None]):
        """
        Args:
            checkpointer: where the main process saves.
            evaluate: () -> results in Detectron2's form; called in every process.
            record: called in the main process when an evaluation's scalars stand in the event storage.
        """
        self.checkpointer = checkpointer
        self.evaluate = evaluate
        self.record = record
        self._saved = None  # the last iteration with a checkpoint
        self._path = os.path.join(checkpointer.output_dir, "evaluations.json")

    def before_train(self):
        self._history = self._read_history() if self.trainer.start_iter else []
        done = self.trainer.start_iter
        if done:
            self._saved = done - 1
            if self._evaluation_due(done):
                recorded = any(entry["iteration"] == done - 1 for entry in self._history)
                if comm.all_gather(recorded)[0] is False or done >= self.trainer.max_iter:
                    self._evaluate(done - 1)
            self._name_final(done)

    def after_step(self):
        done = self.trainer.iter + 1
        last = done == self.trainer.max_iter
        evaluation = self._evaluation_due(done)
        if last or evaluation or done % self.trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 0:
            self.save()
        if evaluation:
            self._evaluate(self.trainer.iter)
        self._name_final(done)

    def after_train(self):
        # Only a run that was asked to stop comes here with a finished step that is not saved.
        if self.trainer.stop.signum and sys.exc_info()[0] is None and self.trainer.iter >= self.trainer.start_iter:
            self.save()

    def save(self) -> None:
        """Save the state after the trainer's iteration, once."""
        iteration = self.trainer.iter
        if self._saved != iteration and comm.is_main_process():
            path = self.checkpointer.save(self.trainer.state(), iteration)
            logger.info(f"saved {path}")
        self._saved = iteration

    def _evaluation_due(self, done: int) -> bool:
        period = self.trainer.cfg.TEST.EVAL_PERIOD
        return bool(self.trainer.cfg.DATASETS.TEST) and (
            done >= self.trainer.max_iter or (period > 0 and done % period == 0)
        )

    def _name_final(self, done: int) -> None:
        if done >= self.trainer.max_iter and comm.is_main_process():
            self.checkpointer.name_final(done - 1)

    def _evaluate(self, iteration: int) -> None:
        trainer = self.trainer
        trainer.sync_buffers()
        with trainer.stop.deferred(False):
            results = self.evaluate()
        if not comm.is_main_process():
            return
        for name, value in flatten_results_dict(results).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                trainer.storage.put_scalar(f"eval/{name}", value, smoothing_hint=False, cur_iter=iteration)
        first = results if "sem_seg" in results else results.get(trainer.cfg.DATASETS.TEST[0], {})
        score = first.get("sem_seg", {}).get("mIoU", math.nan)
        entry = without_nan({"iteration": iteration, "mIoU": score, "results": results})
        others = [e for e in self._history if e["iteration"] != iteration]
        best = max((e["mIoU"] for e in others if e["mIoU"] is not None), default=-math.inf)
        if math.isfinite(score) and score > best:
            self.checkpointer.name_best(iteration)
            logger.info(f"best so far: mIoU {score:.3f} at iteration {iteration}, kept as model_best.pth")
        self._history = sorted([*others, entry], key=lambda e: e["iteration"])
        self.record()
        text = json.dumps(self._history, indent=1)
        write_atomic(self._path, lambda file: file.write(text.encode()))

    def _read_history(self) -> list[dict]:
        """Evaluations up to the checkpoint that the run continues from; later ones will be repeated."""
        if not PathManager.isfile(self._path):
            return []
        with PathManager.open(self._path, "r") as file:
            try:
                return [e for e in json.load(file) if e["iteration"] < self.trainer.start_iter]
            except (ValueError, KeyError, TypeError):
                raise BLPSegError(f"{self._path}: not the list of evaluations this run wrote; move it away") from None


class Writers(HookBase):
    """Calls event writers every ``period`` iterations, after the first and the last.

    Registered before :class:`CheckpointAndEvaluate`: what the iterations before a checkpoint gave is on the disk first.
    """

    def __init__(self, writers: list[EventWriter], period: int):
        self.writers = writers
        self.period = period

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.period == 0 or done in (self.trainer.start_iter + 1, self.trainer.max_iter):
            for writer in self.writers:
                writer.write()

    def write_scalars(self) -> None:
        """Put new scalars (of an evaluation, say) where they are kept, without a line of progress."""
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
                raise  # otherwise the error under way is the one to tell


class ScalarWriter(EventWriter):
    """Base of writers that record every scalar once. Detectron2's skip those of an iteration that comes late, as an
    evaluation's do."""

    def __init__(self, window: int):
        """
        Args:
            window: iterations that noisy scalars are smoothed over (median), as Detectron2's writers do.
        """
        self._window = window
        self._last: dict[str, int] = {}

    def new_scalars(self) -> dict[int, dict[str, float]]:
        """{iteration: {name: value}} of what came since the last call."""
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
        self._file = PathManager.open(path, "a")

    def write(self) -> None:
        lines = [json.dumps({**scalars, "iteration": k}, sort_keys=True) for k, scalars in self.new_scalars().items()]
        if not lines:
            return
        try:
            self._file.write("".join(line + "\n" for line in lines))
            self._file.flush()
            if "://" not in self._path:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"{self._path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter(ScalarWriter):
    """Scalars and pictures for TensorBoard; points of iterations that are run again replace the earlier ones."""

    def __init__(self, output_dir: str, window: int, start_iter: int):
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
    """TensorBoard writes in a thread and passes its errors on to the next call; they need no traceback as well."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


class ProgressWriter(EventWriter):
    """One line a period: losses, learning rate, images/s, share of time spent waiting for data, memory, time left."""

    def __init__(self, max_iter: int, images: int, window: int):
        """
        Args:
            max_iter: the last iteration is the one before it.
            images: images a step, over all processes.
            window: iterations that figures are averaged over.
        """
        self.max_iter, self.images, self.window = max_iter, images, window

    def write(self) -> None:
        storage = get_event_storage()
        histories = storage.histories()

        def mean(name: str) -> float:
            return histories[name].avg(max(1, storage.count_samples(name, self.window)))

        seconds = mean("time")
        names = sorted(k for k in histories if k.startswith("loss_"))
        losses = " ".join(f"{name.removeprefix('loss_')} {mean(name):.4g}" for name in names)
        left = datetime.timedelta(seconds=round(seconds * (self.max_iter - storage.iter - 1)))
        logger.info(
            f"iter {storage.iter + 1}/{self.max_iter} loss {mean('total_loss'):.4g} ({losses}) "
            f"lr {storage.latest()['lr'][0]:.3g} {self.images / seconds:.3g} images/s data "
            f"{mean('data_time') / seconds:.0%} "
            f"mem {memory_gib():.2f} GiB eta {left}"
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
