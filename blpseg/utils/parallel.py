"""The same work on many files, in processes, with progress; a bad file is reported and the others still done."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, tee
from typing import Any

from tqdm import tqdm

from .errors import BLPSegError, debug_enabled, describe, printable
from .progress import progress_bar

_BATCH = 16  # files a worker takes at once


@dataclass
class FileReport:
    """How many files were written, how many were there already and still right, and a line for each that failed."""

    written: int = 0
    up_to_date: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.written + self.up_to_date + len(self.failed)

    def fail(self, line: str) -> None:
        """Count a failure and say so on stderr."""
        self.failed.append(line)
        tqdm.write(f"error: {printable(line)}", file=sys.stderr)

    def finish(self, what: str, folder: str) -> int:
        """Print the summary and return the exit status: 1 where a file failed."""
        print(f"{self.written} {what} written to {folder}, {self.up_to_date} up to date")
        if self.failed:
            print(f"error: {len(self.failed)} of {self.total} could not be made (named above)", file=sys.stderr)
        return int(bool(self.failed))


def map_files(
    function: Callable[[Any], Any],
    items: Iterable,
    workers: int | None,
    description: str,
    *,
    total: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[Any, Any | BLPSegError]]:
    """Yield (item, ``function(item)``) in order, with a progress bar on stderr.

    Args:
        function: picklable. What it raises is yielded as BLPSegError that names the file.
        items: a path, a record with ``file_name``, an object with ``path``, or a tuple whose first is one of these.
        workers: processes; None for one a CPU, 1 works in this one.
        description, total, progress: of the bar; ``total`` where the items have no length.

    Raises:
        BLPSegError: a worker process was killed.
    """
    if isinstance(items, Sequence):
        total = len(items)
    waiting, given = tee(items)
    with progress_bar(total=total, desc=description, unit="file", disable=not progress) as bar:
        for item, result in zip(waiting, map_parallel(partial(_guarded, function), given, workers), strict=True):
            bar.update()
            yield item, result


def process_files(
    function: Callable[[Any], bool], items: Iterable, workers: int | None, description: str, **options
) -> FileReport:
    """Run ``function`` (True: written, False: was up to date) on all items; a failure is printed and counted.

    Arguments are those of :func:`map_files`; without ``progress`` failures are counted alone.
    """
    report = FileReport()
    for _, result in map_files(function, items, workers, description, **options):
        if isinstance(result, BLPSegError) and options.get("progress", True):
            report.fail(describe(result))
        elif isinstance(result, BLPSegError):
            report.failed.append(describe(result))
        elif result:
            report.written += 1
        else:
            report.up_to_date += 1
    return report


def _guarded(function: Callable, item: Any) -> Any | BLPSegError:
    try:
        return function(item)
    except Exception as error:
        return file_error(_file_of(item), error)


def file_error(path: str, error: Exception) -> BLPSegError:
    """What went wrong with a file, in one line that names it."""
    if isinstance(error, BLPSegError):
        return error
    if debug_enabled():
        traceback.print_exception(error)
    reason = f"unexpected {type(error).__name__}: {describe(error)} (--debug shows where)"
    if isinstance(error, MemoryError):
        reason = "out of memory; run again with --workers 1"
    elif isinstance(error, OSError):
        reason = describe(error)
    return BLPSegError(f"{path}: {reason}")


def _file_of(item: Any) -> str:
    if isinstance(item, tuple):
        return _file_of(item[0])
    return item["file_name"] if isinstance(item, dict) else str(getattr(item, "path", item))


def default_workers() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of worker processes that leave Ctrl-C to this one.

    Forked on Linux: a forked process has the packages loaded, a spawned one would load PyTorch for seconds first. What
    runs there must use neither OpenMP nor CUDA.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def map_parallel(function: Callable, items: Iterable, workers: int | None) -> Iterator:
    """Yield ``function(item)`` of every item, in order, from worker processes (None: one a CPU, 1: in this process).

    ``function`` is picklable; items are taken only as fast as workers get through them.

    Raises:
        BLPSegError: a worker died.
    """
    workers = workers or default_workers()
    if workers == 1:
        yield from map(function, items)
        return
    pool = process_pool(workers)
    items = iter(items)
    running: deque[Future[list]] = deque()
    try:
        with warnings.catch_warnings():
            # Workers use none of the threads that Python 3.12 warns of when it forks.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            while batch := list(islice(items, _BATCH)):
                running.append(pool.submit(_run_batch, function, batch))
                if len(running) > 4 * workers:
                    yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    except BrokenProcessPool as error:
        raise BLPSegError(
            "a worker process was killed, perhaps for want of memory; what is done is kept: run again with --workers 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run_batch(function, batch):
    return [function(item) for item in batch]


def _start_worker():
    # The parent's objects stay: what destroys them may wait for threads that a forked process does not have.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool


def die_with(parent: int) -> None:
    """End this process when its parent is killed: an orphan would go on writing beside a resumed run."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return  # not Linux
    if os.getppid() != parent:
        os._exit(1)
