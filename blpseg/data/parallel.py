"""The same work on many files, in processes, with progress; a bad file is reported and the others still done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tqdm import tqdm

from ..errors import BLPSegError, debug_enabled, describe
from .scribbles.batch import default_workers, map_parallel

__all__ = ["FileReport", "default_workers", "is_up_to_date", "map_files", "process_files"]


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
