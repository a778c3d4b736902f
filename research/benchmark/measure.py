"""Pairs measured side by side: seconds in alternation, peak memory in a fresh process for each side."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from blpseg.checkpoint import provenance
from blpseg.utils.errors import BLPSegError, describe

OURS, BASELINE = "ours", "baseline"


def row(part: str, case: str, quantity: str, ours: float, baseline: float | None = None, target=None) -> dict:
    """One figure: ``quantity`` is "time" (seconds), "memory" (MiB), or what ``ours`` is a number of. ``target`` is the
    least ratio baseline / ours, or the most that a figure without a baseline may be."""
    reached = target is not None and (ours <= target if baseline is None else baseline >= target * ours)
    ratio = baseline / ours if baseline is not None and ours else None
    figure = {"benchmark": part, "case": case, "quantity": quantity, "ours": ours, "baseline": baseline, "ratio": ratio}
    return {**figure, "target": target, "verdict": "" if target is None else "pass" if reached else "fall short"}


def environment(device: str) -> dict[str, str | int | float]:
    """What the figures depend on beside the code."""
    with open("/proc/cpuinfo") as file:
        processor = next((x.split(":", 1)[1].strip() for x in file if x.startswith("model name")), platform.machine())
    processor = torch.cuda.get_device_name() if device == "cuda" else processor
    versions = {key: provenance()[key] for key in ("git_revision", "torch")}
    return {"processor": processor, "threads": torch.get_num_threads(), "load": os.getloadavg()[0], **versions}


def compare_time(sides: dict[str, Callable[[], object]], repeat: int, warm_up: bool = True) -> tuple[dict, dict]:
    """Least seconds of each side over ``repeat`` rounds in which the sides take turns, and what each returned last. The
    least, because other work on the machine only adds."""
    seconds, results = dict.fromkeys(sides, float("inf")), {}
    for number in range(-1 if warm_up else 0, repeat):
        for side, run in sides.items():
            results[side] = None  # not to hold two results of one side at once
            _synchronize()
            start = time.perf_counter()
            results[side] = run()
            _synchronize()
            if number >= 0:
                seconds[side] = min(seconds[side], time.perf_counter() - start)
    return seconds, results


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare_memory(workload: str, arguments: dict, sides: tuple[str, ...] = (OURS, BASELINE)) -> dict[str, float]:
    """:func:`peak_memory` of each side of a workload in a process of its own, in MiB."""
    # The server imports once and computes nothing, so that each process forked from it is as good as a fresh one.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["research.benchmark.workloads"])
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other processes cannot take from it
    found = {}
    for side in sides:
        with ProcessPoolExecutor(1, mp_context=context) as child:
            try:
                future = child.submit(_measure, workload, side, arguments, torch.get_num_threads())
                found[side] = future.result() / 2**20
            except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as error:
                raise BLPSegError(f"benchmark {workload}, {side}: out of memory ({describe(error)})") from error
    return found


def _measure(workload: str, side: str, arguments: dict, threads: int) -> int:
    from .workloads import WORKLOADS

    torch.set_num_threads(threads)
    return peak_memory(WORKLOADS[workload](side, **arguments), arguments["device"])


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Bytes that ``run()`` takes at its peak beyond what was there before: of the GPU, or of this process (Linux)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # What was freed may stay resident in glibc's heap, where run() would take it unseen.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # proc(5): the peak becomes what is resident now
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
