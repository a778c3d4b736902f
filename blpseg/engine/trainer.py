"""Detectron2's DefaultTrainer for BLPSeg: the same methods to override, and runs that survive interruption."""

from __future__ import annotations

import functools
import logging
import sys
from collections import OrderedDict

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter
from torch import nn

from ..checkpoint import Checkpointer, load_weights
from ..data.build import build_test_loader, build_train_loader
from ..data.datasets import register_datasets, test_sets
from ..data.datasets.trained import warn_of_classes
from ..evaluation import build_evaluator, check_test_sets, evaluate
from ..utils.device import choose_device
from ..utils.errors import BLPSegError, describe
from .agreement import on_main
from .checkpoint_and_evaluate import CheckpointAndEvaluate
from .defaults import announce
from .interrupt import STOP
from .optimizer import build_optimizer
from .output_dir import claim_output_dir, release_output_dir, setup_logging, start_records
from .resume import find_checkpoint, load_state
from .step import StopTraining, TrainingStep
from .watch import WatchImages
from .writers import Writers, default_writers

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates by config. Override its ``build_*`` methods as those of Detectron2's ``DefaultTrainer``.

    What it adds: a run resumed after a kill at any moment ends with the weights of an undisturbed one; SIGTERM and
    Ctrl-C save first; several processes, also on the CPU, and parts of a batch compute what one process computes at
    once; a step that is not finite never reaches the weights.

    Example::

        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()

    Attributes:
        cfg: frozen, with the SEED that was drawn for SEED -1 and the device that is there.
        model: the network, not wrapped in DistributedDataParallel.
        optimizer, scheduler, scaler: its optimiser, learning rate schedule and gradient scaler.
        data_loader: made when it is first asked for.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            BLPSegError: settings that cannot work.
        """
        TrainerBase.__init__(self)  # DefaultTrainer's own wraps the model for GPUs and starts the loader at once
        if not logging.getLogger("blpseg").isEnabledFor(logging.INFO):
            setup_logging(rank=comm.get_rank())
        self._wanted_device, self._wanted_seed = cfg.MODEL.DEVICE, cfg.SEED
        self.cfg = cfg = cfg.clone()  # for this machine, with a seed, frozen
        cfg.defrost()
        cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE)
        if cfg.SEED < 0:
            cfg.SEED = comm.shared_random_seed() % 2**31
        cfg.freeze()
        self.max_iter = cfg.SOLVER.MAX_ITER
        register_datasets(cfg)
        seed_all_rng(cfg.SEED)
        model = self.build_model(cfg)
        if comm.get_world_size() > 1 and cfg.MODEL.DEVICE == "cuda":
            from timm.layers import convert_sync_batchnorm  # torch's drops the activation in timm's norms

            model = convert_sync_batchnorm(model)
        if cfg.SOLVER.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        self._trainer = TrainingStep(cfg, model, self.build_optimizer(cfg, model), STOP)
        self.scheduler = self.build_lr_scheduler(cfg, self.optimizer)
        self.checkpointer = Checkpointer(cfg.OUTPUT_DIR, cfg.OUTPUT.KEEP_CHECKPOINTS, slim=cfg.OUTPUT.SLIM_MODELS)
        self._last_eval_results: dict = {}
        self.register_hooks(self.build_hooks())

    # ---------------------------------------------------------------------------------------- parts to override
    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The meta-architecture ``MODEL.META_ARCHITECTURE`` on ``MODEL.DEVICE``."""
        return build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`blpseg.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        """``SOLVER.LR_SCHEDULER_NAME``: Detectron2's schedules and DeepLab's ``WarmupPolyLR``. A step an iteration;
        a resumed run repeats those steps.

        Raises:
            BLPSegError: the schedule's keys contradict each other.
        """
        try:
            return build_lr_scheduler(cfg, optimizer)
        except (AssertionError, ValueError) as error:  # STEPS that do not grow, a BASE_LR_END above BASE_LR
            solver = cfg.SOLVER
            raise BLPSegError(
                f"config: SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME} cannot be made of BASE_LR "
                f"{solver.BASE_LR}, BASE_LR_END {solver.BASE_LR_END}, STEPS {solver.STEPS}: {describe(error)}"
            ) from error

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """Batches of this process, an endless iterable. One that resumes exactly has a method
        ``start_at(iteration)``, as :func:`blpseg.data.build.build_train_loader`'s has."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """See :func:`blpseg.data.build.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See :func:`blpseg.evaluation.build_evaluator`; Detectron2's evaluators work as well."""
        return build_evaluator(cfg, dataset_name)

    def build_hooks(self) -> list[HookBase | None]:
        """Schedule, pictures, writers, checkpoints and evaluations, in this order; append your own."""
        cfg = self.cfg
        writers = Writers(lambda: self.build_writers(), cfg.OUTPUT.LOG_PERIOD)
        pictures = comm.is_main_process() and min(cfg.OUTPUT.PANEL_PERIOD, cfg.OUTPUT.PANEL_IMAGES) > 0
        return [
            hooks.LRScheduler(),
            WatchImages(cfg) if pictures else None,
            writers,
            CheckpointAndEvaluate(self.checkpointer, self._evaluate, writers.write_scalars),
        ]

    def build_writers(self) -> list[EventWriter]:
        """Called in the main process when training starts."""
        return default_writers(self.cfg, self.start_iter)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> OrderedDict:
        """Evaluate ``model`` on every data set of ``DATASETS.TEST``, see :func:`blpseg.evaluation.evaluate`.

        Args:
            cfg: a complete config.
            model: with the weights to evaluate; its mode is restored.
            evaluators: one, or one a data set; None for those of :meth:`build_evaluator`.

        Returns:
            ``{task: {metric: number}}`` for a single data set, ``{data set: ...}`` of that for several; empty in
            the other processes.
        """
        names = test_sets(cfg)
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(names):
            raise BLPSegError(f"{len(evaluators)} evaluators for the {len(names)} data sets of DATASETS.TEST")
        given = dict(zip(names, evaluators or [], strict=False))
        # cuDNN's search for algorithms pays in training, where sizes stay the same.
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            return evaluate(
                cfg,
                model,
                build_loader=cls.build_test_loader,
                build_evaluator=lambda cfg, name: given.get(name) or cls.build_evaluator(cfg, name),
            )
        finally:
            torch.backends.cudnn.benchmark = benchmark

    # ------------------------------------------------------------------------------------------------- the run
    def resume_or_load(self, resume: bool = True, *, trust: bool = False) -> None:
        """Continue from the newest readable checkpoint in OUTPUT_DIR, or start from ``MODEL.WEIGHTS``.

        Args:
            resume: whether to look for a checkpoint; without one training starts.
            trust: read files with plain pickle, see :func:`blpseg.checkpoint.load_file`.

        Raises:
            BLPSegError: OUTPUT_DIR holds results and ``resume`` is False, or the file does not fit the model.
        """
        self._claim(resume)
        cfg = self.cfg
        found = find_checkpoint(self.checkpointer, trust=trust) if resume else None
        if found:
            path, state = found
            if self._wanted_seed < 0:
                cfg.defrost()
                cfg.SEED = state["seed"]
                cfg.freeze()
            load_state(self, state, path)
        elif cfg.MODEL.WEIGHTS:
            other_classes = cfg.MODEL.BLPSEG.RESET_CLASS_LAYERS
            data = load_weights(self.model, cfg.MODEL.WEIGHTS, complete=False, other_classes=other_classes, trust=trust)
            if not other_classes:
                warn_of_classes(cfg, data, cfg.MODEL.WEIGHTS)

    def train(self) -> dict:
        """Run the iterations that are left.

        Returns:
            the last evaluation's results, in the main process.

        Raises:
            SystemExit: status 128 + signal, after SIGTERM or Ctrl-C; the state is saved.
            BLPSegError: a batch cannot be read, memory ran out, or a step is not finite.
        """
        STOP.ready()
        self._claim(resume=False)
        try:
            self._run()
        finally:
            release_output_dir(self.cfg.OUTPUT_DIR)
        if STOP.signum and self.iter + 1 < self.max_iter:
            if comm.is_main_process():
                words = f"interrupted after iteration {self.iter}: saved in {self.cfg.OUTPUT_DIR}; go on with --resume"
                print(words, file=sys.stderr, flush=True)
            raise SystemExit(STOP.status)
        return self._last_eval_results

    def _claim(self, resume: bool) -> None:
        if claim_output_dir(self.cfg, resume=resume):
            announce(self._wanted_device, self.cfg.MODEL.DEVICE)

    def _run(self) -> None:
        torch.backends.cudnn.benchmark = self.cfg.CUDNN_BENCHMARK
        on_main(lambda: check_test_sets(self.cfg, self.build_evaluator))
        on_main(lambda: start_records(self.cfg.OUTPUT_DIR, self.config_text, self.start_iter))
        if self.cfg.SOLVER.COMPILE:
            for module in (self.model.backbone, getattr(self.model.sem_seg_head, "pixel_decoder", None)):
                if module is not None:
                    module.compile()
        self._trainer.connect()
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage, STOP.deferred():
            try:
                if self.start_iter < self.max_iter:
                    self._start_loader()
                self.before_train()
                for iteration in range(self.start_iter, self.max_iter):
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.after_step()
            except StopTraining:
                self.iter -= 1  # the last iteration that is complete
            finally:
                self.after_train()

    def _start_loader(self) -> None:
        loader = self.data_loader
        if hasattr(loader, "start_at"):
            loader.start_at(self.start_iter)
        elif self.start_iter:
            logger.warning(
                f"{type(loader).__name__} has no start_at(iteration): training goes on, but with other batches than an "
                "uninterrupted run"
            )

    @property
    def data_loader(self):
        if self._trainer.data_loader is None:
            self._trainer.data_loader = self.build_train_loader(self.cfg)
        return self._trainer.data_loader

    @property
    def scaler(self) -> torch.amp.GradScaler:
        return self._trainer.scaler

    @functools.cached_property
    def config_text(self) -> str:
        """The config as YAML; making it takes a third of a second."""
        return self.cfg.dump()

    def sync_buffers(self) -> None:
        """Give every process the main process's batch norm statistics."""
        self._trainer.sync_buffers()

    def _evaluate(self) -> dict:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results
