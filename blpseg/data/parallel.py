"""The same work on many files, in processes, with progress; a bad file is reported and the others still done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cv2
from tqdm import tqdm

from ..errors import BLPSegError, debug_enabled, describe

__all__ = ["FileReport", "available_cpus", "is_up_to_date", "map_files", "process_files"]

_CHUNK = 8  # items handed to a process at a time


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


def available_cpus() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    guarded = partial(_guarded, function)
    with tqdm(total=len(items), desc=description, unit="file", file=sys.stderr, mininterval=0.5) as bar:
        for item, result in zip(items, _results(guarded, items, jobs), strict=True):
            bar.update()
            yield item, result


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


def _results(function: Callable, items: Sequence, jobs: int) -> Iterable:
    if jobs <= 1 or len(items) <= _CHUNK:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(min(jobs, len(items)), initializer=_start_worker)
    try:
        yield from pool.map(function, items, chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise BLPSegError("a worker process was killed, perhaps for want of memory; try --jobs 1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism


def _guarded(function: Callable, item: Any) -> Any:
    try:
        return function(item)
    except BLPSegError as error:
        return error
    except Exception as error:
        if debug_enabled():
            raise
        return BLPSegError(f"{item}: {type(error).__name__}: {describe(error)}")
