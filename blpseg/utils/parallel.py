"""The same work on many files, in processes, with progress; a bad file is reported and the others still done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from tqdm import tqdm

from .errors import BLPSegError, debug_enabled, describe

__all__ = ["FileReport", "default_workers", "is_up_to_date", "map_files", "map_parallel", "process_files"]

_BATCH = 16  # files a worker takes at once


@dataclass
class FileReport:
    """How many files were written and how many were there already, and a line for each that failed."""

    written: int = 0
    kept: int = 0
    failures: list[str] = field(default_factory=list)

    def finish(self, what: str) -> int:
        """Print the summary and return the exit status: 1 where a file failed."""
        line = f"{what}: {self.written} written, {self.kept} up to date"
        if self.failures:
            print(f"{line}, {len(self.failures)} failed", file=sys.stderr)
            return 1
        print(line)
        return 0


def is_up_to_date(output: str, *sources: str) -> bool:
    """Whether a local file exists and is no older than what it is made from."""
    if not os.path.isfile(output):
        return False
    made = os.path.getmtime(output)
    return all(os.path.getmtime(source) <= made for source in sources)


def map_files(
    function: Callable[[Any], Any], items: Sequence, jobs: int, description: str
) -> Iterator[tuple[Any, Any | BLPSegError]]:
    """Yield (item, ``function(item)``) in order, with a progress bar on stderr.

    Args:
        function: at module level, so that processes find it. What it raises is yielded as BLPSegError, but for errors
            that are not about the input while debugging.
        items: what to call it with.
        jobs: processes; 1 works in this one.
        description: of the bar.

    Raises:
        BLPSegError: a worker process was killed.
    """
    waiting: dict[int, Any] = {}
    following = 0
    with tqdm(total=len(items), desc=description, unit="file", file=sys.stderr, mininterval=0.5) as bar:
        for number, result in map_parallel(partial(_guarded, function), enumerate(items), max(1, jobs)):
            bar.update()
            waiting[number] = result
            while following in waiting:
                yield items[following], waiting.pop(following)
                following += 1


def process_files(function: Callable[[Any], bool], items: Sequence, jobs: int, description: str) -> FileReport:
    """Run ``function`` (True: written, False: was up to date) on all items; a failure is printed and counted."""
    report = FileReport()
    for _, result in map_files(function, items, jobs, description):
        if isinstance(result, BLPSegError):
            report.failures.append(str(result))
            tqdm.write(f"error: {result}", file=sys.stderr)
        elif result:
            report.written += 1
        else:
            report.kept += 1
    return report


def _guarded(function: Callable, numbered: tuple[int, Any]) -> tuple[int, Any]:
    number, item = numbered
    try:
        return number, function(item)
    except BLPSegError as error:
        return number, error
    except Exception as error:
        if debug_enabled():
            raise
        return number, BLPSegError(f"{item}: {type(error).__name__}: {describe(error)}")


def default_workers() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_parallel(function: Callable, items: Iterable, workers: int) -> Iterator:
    """``function`` of every item, in processes, as results come (in no set order).

    Args:
        function: picklable.
        items: taken only as fast as workers get through them.
        workers: 1 works in this process.

    Raises:
        BLPSegError: a worker died.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # A forked worker has the packages loaded; a spawned one would load PyTorch for seconds first.
    method = "fork" if sys.platform == "linux" else None
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=_ignore_interrupt)
    items = iter(items)
    running = set()
    try:
        with warnings.catch_warnings():
            # Workers use none of the threads that Python 3.12 warns of when it forks.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            while batch := list(islice(items, _BATCH)):
                running.add(pool.submit(_run_batch, function, batch))
                if len(running) > 2 * workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield from future.result()
        for future in as_completed(running):
            yield from future.result()
    except BrokenProcessPool as error:
        raise BLPSegError(
            "a worker process was killed, perhaps for want of memory; what is done is kept: run again with --workers 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run_batch(function, batch):
    return [function(item) for item in batch]


def _ignore_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
