"""Evaluation of a model by config: builds evaluators, prints the scores and writes results.json."""

from __future__ import annotations

import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from tabulate import tabulate
from torch import nn

from ..data.build import build_test_loader
from ..data.datasets import load_records, test_sets
from ..data.datasets.trained import warn_of_seen
from ..utils.errors import BLPSegError
from ..utils.files import without_nan, write_json
from .crf import CRFEvaluator, DenseCRF
from .from_scribbles import FEWEST_IMAGES, ScribbleEvaluator
from .inference import Inference
from .report import ReportEvaluator
from .sem_seg import SemSegEvaluator
from .volume import VolumeEvaluator

logger = logging.getLogger(__name__)

# Metadata's evaluator_type -> class with from_config(cfg, dataset_name, output_dir).
EVALUATORS = {"sem_seg": SemSegEvaluator, "sem_seg_volume": VolumeEvaluator}


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator of a data set, by its metadata's ``evaluator_type``, with what ``TEST.*`` adds to it.

    Where not all of the records have masks, but all have scribbles, a :class:`ScribbleEvaluator` on their strokes.

    Args:
        cfg: ``TEST.CRF``, ``TEST.REPORT``, ``TEST.SCRIBBLE_ESTIMATE`` and the evaluators' own keys are read.
        dataset_name: a name in the catalogs.
        output_dir: for files; None for ``<OUTPUT_DIR>/inference/<dataset_name>``.

    Raises:
        BLPSegError: an unknown data set or evaluator type, or another number of classes than the config's.
    """
    if dataset_name not in DatasetCatalog:
        raise BLPSegError(f"data set {dataset_name!r} is not registered; see docs/DATA.md")
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    if kind not in EVALUATORS:
        raise BLPSegError(
            f"data set {dataset_name}: evaluator_type {kind!r} in its metadata; known are {', '.join(EVALUATORS)}"
        )
    classes = len(metadata.stuff_classes)
    if classes != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
        raise BLPSegError(
            f"data set {dataset_name} has {classes} classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
            f"{cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}; they must agree"
        )
    output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    kinds = _evaluator_classes(cfg, dataset_name, EVALUATORS[kind])
    evaluators = [kind.from_config(cfg, dataset_name, output_dir) for kind in kinds]
    evaluator = evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
    if cfg.TEST.CRF.ENABLED:
        return CRFEvaluator(evaluator, DenseCRF.from_config(cfg), cfg.TEST.CRF.NUM_WORKERS, cfg.INPUT.FORMAT)
    return evaluator


def _evaluator_classes(cfg: CfgNode, dataset_name: str, by_masks: type) -> list[type]:
    records = DatasetCatalog.get(dataset_name)
    scribbled, masked = (sum(key in r for r in records) for key in ("scribble_file_name", "sem_seg_file_name"))
    scribbles = scribbled == len(records)
    masks = not scribbles or masked == len(records)
    if cfg.TEST.SCRIBBLE_ESTIMATE and not scribbles:
        _warn(f"TEST.SCRIBBLE_ESTIMATE: only {scribbled} of {len(records)} images of {dataset_name} have a scribble")
    if masked and not masks:
        _warn(f"{dataset_name}: only {masked} of {len(records)} images have a mask, so strokes are measured on")
    if not masks and (cfg.TEST.REPORT.ENABLED or cfg.TEST.WRITE_PREDICTIONS):
        _warn(f"{dataset_name}: TEST.REPORT and .WRITE_PREDICTIONS need masks; tools/demo.py --raw writes class maps")
    kinds = [by_masks] if masks else []
    if masks and cfg.TEST.REPORT.ENABLED:
        kinds.append(ReportEvaluator)
    if scribbles and (not masks or cfg.TEST.SCRIBBLE_ESTIMATE):
        kinds.append(ScribbleEvaluator)
    return kinds


def evaluate(
    cfg: CfgNode,
    model: nn.Module,
    *,
    build_loader: Callable = build_test_loader,
    build_evaluator: Callable = build_evaluator,
) -> OrderedDict:
    """Evaluate ``model`` on every data set of ``DATASETS.TEST`` (or held-out images), as ``TEST.*`` says.

    In a distributed job every process must call it. The main process prints for each data set a table of the
    classes and a line ``mIoU: <percent>``, logs Detectron2's copy-paste lines and writes
    ``<OUTPUT_DIR>/results.json``: ``{data set: {task: {metric: number or null}}}``.

    Args:
        cfg: a complete config.
        model: takes and gives what :class:`blpseg.modeling.BLPSeg` does; its mode is restored.
        build_loader, build_evaluator: (cfg, data set's name) -> test loader, evaluator.

    Returns:
        Detectron2's form: ``{task: {metric: number}}`` for a single data set, ``{data set: ...}`` of that for
        several; empty in the other processes.

    Raises:
        BLPSegError: no data set is named, or the data are unsound (:meth:`SemSegEvaluator.process`).
    """
    names = test_sets(cfg)
    if not names:
        raise BLPSegError("config: DATASETS.TEST is empty; name a data set to evaluate on")
    results = OrderedDict()
    for dataset_name in names:
        loader, evaluator = build_loader(cfg, dataset_name), build_evaluator(cfg, dataset_name)
        parts = _parts(evaluator)
        # Detectron2's evaluators and a CRF start from logits; for ours a class map is enough: a byte a pixel.
        maps = all(isinstance(part, (SemSegEvaluator, ReportEvaluator, ScribbleEvaluator)) for part in parts)
        annotated = any(isinstance(part, ScribbleEvaluator) for part in parts)
        inference = Inference.from_config(cfg, model, classes_only=maps, annotated=annotated)
        dataset_results = inference_on_dataset(inference, loader, evaluator)
        if comm.is_main_process():
            results[dataset_name] = dataset_results
            print(results_table(dataset_name, dataset_results, inference.views), flush=True)
            print_csv_format(dataset_results)
    if comm.is_main_process():
        write_json(os.path.join(cfg.OUTPUT_DIR, "results.json"), results)
    return next(iter(results.values())) if len(results) == 1 else results


def check_test_sets(cfg: CfgNode, build_evaluator: Callable = build_evaluator) -> None:
    """Find, before hours of training, what would end the evaluation after them: missing files, wrong sizes or values.

    Masks are read for evaluators of ours. Raises BLPSegError for the first fault.
    """
    warn_of_seen(cfg, cfg)
    if not test_sets(cfg):
        logger.info("nothing to evaluate on; DATASETS.HOLD_OUT 0.2 estimates the mIoU from strokes that are held out")
    for name in test_sets(cfg):
        try:
            load_records(name)
            for part in _parts(build_evaluator(cfg, name)):
                if isinstance(part, (SemSegEvaluator, ScribbleEvaluator)):
                    part.check_labels()
        except BLPSegError as error:
            off = 'DATASETS.TEST "()"' if cfg.DATASETS.TEST else "DATASETS.HOLD_OUT 0"
            raise BLPSegError(f"{error}; or train without evaluation: {off}") from error


def _warn(line: str) -> None:
    log_first_n(logging.WARNING, line, name=__name__, key="message")  # it stands for every evaluation of a run


def _parts(evaluator: DatasetEvaluator) -> list[DatasetEvaluator]:
    if isinstance(evaluator, CRFEvaluator):
        return [evaluator, *_parts(evaluator._evaluator)]
    return evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]


def results_table(dataset_name: str, results: Mapping[str, Mapping[str, float]], views: int) -> str:
    """The numbers of one data set for a reader: a table by class, a table of the rest, the line ``mIoU: ...``."""
    by_class: dict[str, dict[str, float]] = {}
    overall = []
    owners: dict[str, str] = {}  # a metric of two tasks bears the second one's name
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, dash, name = key.partition("-")
            metric = metric if owners.setdefault(metric, task) == task else f"{metric}, {task}"
            if dash:
                by_class.setdefault(name, {})[metric] = value
            else:
                overall.append((metric, without_nan(value)))
    columns = list(dict.fromkeys(metric for row in by_class.values() for metric in row))
    rows = [[name, *(without_nan(row.get(metric)) for metric in columns)] for name, row in by_class.items()]
    plural = "s" if views > 1 else ""
    return "\n".join(
        [
            f"{dataset_name}, {views} view{plural} of each image",
            tabulate(rows, headers=["class", *columns], floatfmt=".2f", missingval="-"),
            "",
            tabulate(overall, floatfmt=".2f", tablefmt="plain", missingval="-"),
            *(_summary(task, metrics) for task, metrics in results.items() if task in ("sem_seg", "scribbles")),
        ]
    )


def _summary(task: str, metrics: Mapping[str, float]) -> str:
    if task == "sem_seg":
        return f"mIoU: {metrics['mIoU']:.3f}"
    interval = f"95 % interval {metrics['mIoU_low']:.1f} to {metrics['mIoU_high']:.1f}"
    if math.isnan(metrics["mIoU_low"]):
        interval = f"fewer than {FEWEST_IMAGES} images: no interval"
    alone = f"on annotated pixels alone {metrics['mIoU_annotated_pixels']:.1f}"
    return f"mIoU estimated from scribbles: {metrics['mIoU']:.1f} ({interval}); {alone}"
