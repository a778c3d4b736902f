"""Data loaders whose batches depend only on the seed and the place in the run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np
import torch
import torch.utils.data
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm

from ..utils.errors import BLPSegError, debug_enabled, describe
from ..utils.files import read_label
from ..utils.labels import UNANNOTATED
from ..utils.parallel import die_with
from .dataset_mapper import LABEL_FILES, ScribbleDatasetMapper
from .datasets import load_records, register_datasets, split_records

_PERMUTATION, _SAMPLE = 0, 1  # the two kinds of random streams differ by it


def build_train_loader(
    cfg: CfgNode,
    start_iter: int = 0,
    mapper: Callable[[dict, np.random.Generator], dict] | None = None,
) -> torch.utils.data.DataLoader:
    """An endless loader over DATASETS.TRAIN; counterpart of ``build_detection_train_loader``.

    Sample k of the run (k = iteration * SOLVER.IMS_PER_BATCH + place in the batch) is image k mod n of a permutation
    drawn for epoch k div n, augmented with random numbers drawn for k: all from SEED. So neither the number of workers
    nor that of processes matters (rank r takes the r-th slice of each batch), and a resumed run continues with the
    samples that the interrupted one would have seen. A negative SEED draws one, the same for all processes.

    Args:
        cfg: DATASETS, INPUT, SOLVER.IMS_PER_BATCH (over all processes), DATALOADER.NUM_WORKERS, SEED.
        start_iter: the first iteration to deliver.
        mapper: called with a record and a random generator; by default ``ScribbleDatasetMapper(cfg, True)``.

    Returns:
        Iterating gives lists of IMS_PER_BATCH / world size mapped records.

    Raises:
        BLPSegError: data is missing, no label has an annotated pixel, classes do not fit the model, or the batch cannot
            be divided. While iterating: a file is bad; also from a worker process it arrives as this one line.
    """
    register_datasets(cfg)
    if not cfg.DATASETS.TRAIN:
        raise BLPSegError("DATASETS.TRAIN is empty; name a data set to train on")
    optional = ("scribbles",) if cfg.INPUT.SUPERVISION == "dense" else ()
    records = [record for name in cfg.DATASETS.TRAIN for record in _load(cfg, name, optional)]
    records = split_records(records, cfg.DATASETS.HOLD_OUT)[0]
    if not records:
        raise BLPSegError(f"DATASETS.HOLD_OUT {cfg.DATASETS.HOLD_OUT} leaves no image to train on; hold out fewer")
    _require_annotation(records, LABEL_FILES[cfg.INPUT.SUPERVISION])
    world_size = comm.get_world_size()
    images_per_process(cfg, world_size)  # raises where they cannot be divided
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return _Loader(
        _RunDataset(records, mapper or ScribbleDatasetMapper(cfg, is_train=True), cfg.DATALOADER.NUM_WORKERS, seed),
        batch_sampler=_RunBatches(cfg.SOLVER.IMS_PER_BATCH, world_size, comm.get_rank(), start_iter),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        worker_init_fn=partial(_start_worker, os.getpid()),
    )


def images_per_process(cfg: CfgNode, world_size: int) -> int:
    """SOLVER.IMS_PER_BATCH divided by the number of processes.

    Raises:
        BLPSegError: it cannot be divided evenly, or SOLVER.ACCUMULATION_STEPS is more than each process's share.
    """
    total, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    if total < 1 or total % world_size:
        raise BLPSegError(
            f"config: SOLVER.IMS_PER_BATCH {total} is the total over all processes and must be a multiple of their "
            f"number, {world_size}"
        )
    if not 1 <= parts <= total // world_size:
        raise BLPSegError(
            f"config: SOLVER.ACCUMULATION_STEPS {parts} must be from 1 to the images of a process, "
            f"{total // world_size}"
        )
    return total // world_size


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Callable[[dict], dict] | None = None
) -> torch.utils.data.DataLoader:
    """A loader with one image in a batch, in the order of the records, divided among the processes.

    Counterpart of ``build_detection_test_loader``; ``mapper`` is by default ``ScribbleDatasetMapper(cfg, False)``.
    Raises as :func:`build_train_loader`.
    """
    register_datasets(cfg)
    records = _load(cfg, dataset_name)
    return _Loader(
        _MappedDataset(records, mapper or ScribbleDatasetMapper(cfg, is_train=False), cfg.DATALOADER.NUM_WORKERS),
        sampler=InferenceSampler(len(records)),
        batch_size=1,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        worker_init_fn=partial(_start_worker, os.getpid()),
    )


def _load(cfg: CfgNode, name: str, optional: tuple[str, ...] = ()) -> list[dict]:
    records = load_records(name, optional)
    if not records:
        raise BLPSegError(f"data set {name!r} is empty")
    classes = MetadataCatalog.get(name).get("stuff_classes")
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if classes is not None and len(classes) != count:
        raise BLPSegError(
            f"data set {name!r} has {len(classes)} classes, MODEL.SEM_SEG_HEAD.NUM_CLASSES is {count}; make them agree"
        )
    return records


def _require_annotation(records: list[dict], key: str) -> None:
    """Reads labels up to the first with an annotated pixel, which mostly is the first of all."""
    paths = [record[key] for record in records if key in record]
    if paths and not any((read_label(path) != UNANNOTATED).any() for path in paths):
        raise BLPSegError(
            f"{paths[0]}: nothing is annotated in it, nor in the other {len(paths) - 1} labels to train on, all pixels "
            f"are {UNANNOTATED}; draw strokes (tools/annotate.py), or convert them (docs/SCRIBBLES.md)"
        )


class _MappedDataset(torch.utils.data.Dataset):
    """Record i, mapped. A failure is returned, not raised: :class:`_Loader` raises it in the main process, where a
    worker's exception would arrive with the traceback in its message."""

    def __init__(self, records: list[dict], mapper: Callable, num_workers: int):
        self._records = DatasetFromList(records, copy=True)  # one shared buffer, not a list that each worker copies
        self._mapper = mapper
        # Row i: process id of worker i and the record it reads, to name the record if the worker dies.
        self._at_work = torch.full((num_workers, 2), -1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict | BLPSegError:
        return self._map(index)

    def read_by(self, pids: set[int]) -> list[str]:
        """The image files that the workers of these process ids were last at."""
        return [self._records[index]["file_name"] for pid, index in self._at_work.tolist() if pid in pids]

    def _map(self, index: int, *arguments) -> dict | BLPSegError:
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            self._at_work[worker.id, 0], self._at_work[worker.id, 1] = os.getpid(), index
        record = self._records[index]
        try:
            return self._mapper(record, *arguments)
        except BLPSegError as error:
            return error
        except Exception as error:
            if debug_enabled():
                raise
            return BLPSegError(f"{record['file_name']}: {type(error).__name__} while reading: {describe(error)}")


class _RunDataset(_MappedDataset):
    """Sample k of a training run."""

    def __init__(self, records: list[dict], mapper: Callable, num_workers: int, seed: int):
        super().__init__(records, mapper, num_workers)
        self._seed = seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> dict | BLPSegError:
        epoch, place = divmod(position, len(self._records))
        if epoch != self._epoch:
            order = np.random.default_rng((self._seed, _PERMUTATION, epoch)).permutation(len(self._records))
            self._epoch, self._order = epoch, order
        rng = np.random.default_rng((self._seed, _SAMPLE, position))
        return self._map(int(self._order[place]), rng)


class _RunBatches(torch.utils.data.Sampler):
    """Positions of this process's slice of every batch, from an iteration on, without end."""

    def __init__(self, batch: int, world_size: int, rank: int, start_iter: int):
        self._batch, self._share, self._rank = batch, batch // world_size, rank
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start_iter * self._batch + self._rank * self._share
        while True:
            yield list(range(first, first + self._share))
            first += self._batch


class _Loader(torch.utils.data.DataLoader):
    def start_at(self, iteration: int) -> None:
        """The next iterator of a training loader delivers the batches from ``iteration`` on."""
        self.batch_sampler.start_iter = iteration

    def __iter__(self) -> Iterator[list[dict]]:
        try:
            for batch in super().__iter__():
                for sample in batch:
                    if isinstance(sample, BLPSegError):
                        raise sample
                yield batch
        except RuntimeError as error:
            raise self._explain(error) from error

    def _explain(self, error: RuntimeError) -> Exception:
        """Torch reports a dead worker by its process id; a user needs the file it was reading."""
        pids = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if pids is None:
            return error
        files = self.dataset.read_by({int(pid) for pid in pids[1].split(",")})
        return BLPSegError(
            f"{', '.join(files)}: the loader worker at this file died ({describe(error)}); lower "
            "DATALOADER.NUM_WORKERS if memory ran out, or see whether the file opens elsewhere"
        )


def _start_worker(parent: int, worker: int) -> None:
    die_with(parent)
    cv2.setNumThreads(0)  # the workers are the parallelism
    # Out of the process group: Ctrl-C or a scheduler's signal to the group is for the training process, which still
    # needs batches to finish its step; the workers end with it.
    os.setpgrp()
    if not debug_enabled():
        # One of torch's threads prints through it when the training process ends while a sample is in transit.
        sys.excepthook = lambda *_: None
