"""Pairs measured side by side: seconds in alternation, peak memory in a fresh process for each side."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

import torch
from tabulate import tabulate

from blpseg.checkpoint import provenance
from blpseg.utils.errors import BLPSegError, describe

__all__ = ["Row", "compare_memory", "compare_time", "environment", "peak_memory", "table"]

OURS, BASELINE = "ours", "baseline"


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        benchmark, case: what was measured.
        quantity: "time" in seconds, "memory" in MiB, or what ``ours`` is a number of.
        ours, baseline: the two sides; baseline None for a figure that stands alone.
        target: least ratio baseline / ours, or, for a figure that stands alone, the most it may be; None without.
        note: why a figure is missing, or how it came about.
    """

    benchmark: str
    case: str
    quantity: str
    ours: float | None
    baseline: float | None = None
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """baseline / ours; None where one is missing or ours is 0."""
        if self.ours is None or self.baseline is None:
            return None
        return self.baseline / self.ours if self.ours else None

    @property
    def verdict(self) -> str:
        """Pass, fall short, or "" where there is no target or no figure."""
        if self.target is None or self.ours is None:
            return ""
        passes = self.ours <= self.target if self.baseline is None else self.baseline >= self.target * self.ours
        return "pass" if passes else "fall short"

    def as_dict(self) -> dict:
        return {**asdict(self), "ratio": self.ratio, "verdict": self.verdict}


def table(rows: list[Row]) -> str:
    """The rows for people."""

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"

    def target(row: Row) -> str:
        if row.target is None:
            return ""
        return f"<= {row.target:g}" if row.baseline is None else f">= {number(row.target)} x"

    return tabulate(
        [
            [
                row.benchmark, row.case, row.quantity, number(row.ours), number(row.baseline),
                "" if row.ratio is None else f"{number(row.ratio)} x", target(row), row.verdict, row.note,
            ]
            for row in rows
        ],
        headers=["benchmark", "case", "quantity", "ours", "baseline", "ratio", "target", "verdict", "note"],
        disable_numparse=True,
    )  # fmt: skip


def environment(device: str) -> dict:
    """What the figures depend on beside the code."""
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        processor = platform.processor() or platform.machine()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as file:
                names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
            processor = names[0] if names else processor
    return {
        "device": device,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        **provenance(),
    }


def compare_time(
    sides: dict[str, Callable[[], object]], repeat: int, warm_up: bool = True
) -> tuple[dict[str, float], dict[str, object]]:
    """Least seconds of each side over ``repeat`` rounds in which the sides take turns, and what each returned last.

    The least is what the machine can do; other work on it only ever adds.
    """
    seconds, results = dict.fromkeys(sides, float("inf")), {}
    for round_ in range(-1 if warm_up else 0, repeat):
        for side, run in sides.items():
            results[side] = None  # not to hold two results of one side at once
            _synchronize()
            start = time.perf_counter()
            results[side] = run()
            _synchronize()
            if round_ >= 0:
                seconds[side] = min(seconds[side], time.perf_counter() - start)
    return seconds, results


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare_memory(workload: str, options: dict, sides: tuple[str, ...] = (OURS, BASELINE)) -> dict[str, float]:
    """:func:`peak_memory` of each side in a process of its own, in MiB.

    Raises:
        BLPSegError: a process failed, by running out of memory for one.
    """
    return {side: _in_child(workload, side, options) for side in sides}


def _in_child(workload: str, side: str, options: dict) -> float:
    # The server imports once and computes nothing, so that each process forked from it is as good as a fresh one.
    context = multiprocessing.get_context("forkserver")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # which other processes cannot take from
    context.set_forkserver_preload(["blpseg.benchmark.workloads"])
    with ProcessPoolExecutor(1, mp_context=context) as child:
        try:
            return child.submit(_measure, workload, side, options, torch.get_num_threads()).result() / 2**20
        except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as error:
            raise _out_of_memory(workload, side, error) from error
        except RuntimeError as error:  # what a CPU's allocator raises has no kind of its own
            if "allocate memory" not in str(error):
                raise
            raise _out_of_memory(workload, side, error) from error


def _out_of_memory(workload: str, side: str, error: BaseException) -> BLPSegError:
    return BLPSegError(f"benchmark {workload}, {side}: out of memory ({describe(error)})")


def _measure(workload: str, side: str, options: dict, threads: int) -> int:
    from .workloads import WORKLOADS

    torch.set_num_threads(threads)
    return peak_memory(WORKLOADS[workload](side, **options), options.get("device", "cpu"))


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Bytes that ``run()`` takes at its peak beyond what was there before it: of the device, or of this process."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not os.path.exists("/proc/self/clear_refs"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        unit = 1 if sys.platform == "darwin" else 1024
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    _give_back_freed_memory()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # proc(5): the peak becomes what is resident now
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _give_back_freed_memory() -> None:
    """What was freed may stay resident in the C library's heap, where ``run()`` would take it unseen (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
