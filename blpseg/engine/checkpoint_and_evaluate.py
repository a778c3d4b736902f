"""Checkpoints and evaluations on the way and at the end of a run."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..checkpoint import Checkpointer
from ..data.datasets import test_sets
from ..utils.errors import BLPSegError
from ..utils.files import without_nan, write_bytes_atomic
from .interrupt import STOP
from .resume import training_state

logger = logging.getLogger(__name__)


class CheckpointAndEvaluate(HookBase):
    """Saves every ``SOLVER.CHECKPOINT_PERIOD`` iterations, evaluates every ``TEST.EVAL_PERIOD``, and both at the end.

    Detectron2's ``PeriodicCheckpointer``, ``EvalHook`` and ``BestCheckpointer`` in one, since they depend on each
    other: a checkpoint (at the end ``model_final.pth`` too) precedes each evaluation; a run that is killed while it
    evaluates repeats the evaluation when it is resumed, and knows the best score from before. ``evaluations.json``
    lists the results, ``model_best.pth`` is the checkpoint of the highest mIoU on the first data set of
    ``DATASETS.TEST``.
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
            self._name_final(done)
            if self._evaluation_due(done):
                recorded = any(entry["iteration"] == done - 1 for entry in self._history)
                if comm.all_gather(recorded)[0] is False or done >= self.trainer.max_iter:
                    self._evaluate(done - 1)

    def after_step(self):
        done = self.trainer.iter + 1
        last = done == self.trainer.max_iter
        evaluation = self._evaluation_due(done)
        if last or evaluation or done % self.trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 0:
            self.save()
        self._name_final(done)
        if evaluation:
            self._evaluate(self.trainer.iter)

    def after_train(self):
        # Only a run that was asked to stop comes here with a finished step that is not saved.
        if STOP.signum and sys.exc_info()[0] is None and self.trainer.iter >= self.trainer.start_iter:
            self.save()

    def save(self) -> None:
        """Save the state after the trainer's iteration, once."""
        iteration = self.trainer.iter
        if self._saved != iteration and comm.is_main_process():
            path = self.checkpointer.save(training_state(self.trainer), iteration)
            logger.info(f"saved {path}")
        self._saved = iteration

    def _evaluation_due(self, done: int) -> bool:
        period = self.trainer.cfg.TEST.EVAL_PERIOD
        return bool(test_sets(self.trainer.cfg)) and (
            done >= self.trainer.max_iter or (period > 0 and done % period == 0)
        )

    def _name_final(self, done: int) -> None:
        if done >= self.trainer.max_iter and comm.is_main_process():
            path = self.checkpointer.name_final(done - 1)
            logger.info(f"the trained model: tools/demo.py --weights {shlex.quote(path)} --input ... makes masks")

    def _evaluate(self, iteration: int) -> None:
        trainer = self.trainer
        trainer.sync_buffers()
        with STOP.deferred(False):
            results = self.evaluate()
        if not comm.is_main_process():
            return
        for name, value in flatten_results_dict(results).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                trainer.storage.put_scalar(f"eval/{name}", value, smoothing_hint=False, cur_iter=iteration)
        first = results.get(test_sets(trainer.cfg)[0], results)
        score = next((first[task]["mIoU"] for task in ("sem_seg", "scribbles") if task in first), math.nan)
        entry = without_nan({"iteration": iteration, "mIoU": score, "results": results})
        others = [e for e in self._history if e["iteration"] != iteration]
        best = max((e["mIoU"] for e in others if e["mIoU"] is not None), default=-math.inf)
        if math.isfinite(score) and score > best:
            self.checkpointer.name_best(iteration)
            logger.info(f"best so far: mIoU {score:.3f} at iteration {iteration}, kept as model_best.pth")
        self._history = sorted([*others, entry], key=lambda e: e["iteration"])
        self.record()
        write_bytes_atomic(self._path, json.dumps(self._history, indent=1).encode(), durable=True)

    def _read_history(self) -> list[dict]:
        """Evaluations up to the checkpoint that the run continues from; later ones will be repeated."""
        if not os.path.isfile(self._path):
            return []
        try:
            entries = json.loads(Path(self._path).read_bytes())
            [entry["mIoU"] is None or float(entry["mIoU"]) for entry in entries]
            return [entry for entry in entries if entry["iteration"] < self.trainer.start_iter]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BLPSegError(f"{self._path}: not the list of evaluations this run wrote; move it away") from None
