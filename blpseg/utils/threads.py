"""How many CPU threads to use on a machine that others use too. Imports no PyTorch."""

from __future__ import annotations

import os
import time


def wait_passively() -> None:
    """Let threads that wait for others sleep rather than spin, which costs them the CPU while it is shared.

    Only of use before PyTorch loads its OpenMP (GNU's or Intel's); settings of the user's stay.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def allowed_cpus(cgroup: str = "/sys/fs/cgroup") -> float:
    """The CPUs that this process may use: by affinity, and by the quota of its control group (v2 or v1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (
        _words(f"{cgroup}/cpu.max")
        or (
            *_words(f"{cgroup}/cpu/cpu.cfs_quota_us"),
            *_words(f"{cgroup}/cpu/cpu.cfs_period_us"),
        )
        or ("max", "1")
    )
    return min(count, int(quota) / int(period)) if quota.isdecimal() and int(period) else float(count)


def busy_cpus(seconds: float = 0.3) -> float:
    """The CPUs of this machine that others keep busy, measured while this process sleeps; 0 where that is unknown."""
    before = _cpu_times()
    time.sleep(seconds)
    idle, total = (now - then for now, then in zip(_cpu_times(), before, strict=True))
    return (os.cpu_count() or 1) * (1 - idle / total) if total > 0 else 0.0


def choose_threads(processes: int, cpus: float, busy: float) -> int:
    """Threads of each of ``processes`` processes of this machine: what is free, at least one. Where ``cpus`` are a part
    of the machine's, the same share of them counts as ``busy``."""
    total = max(os.cpu_count() or 1, cpus)
    free = max(0.0, cpus * (1 - busy / total))
    return max(1, int((free + 0.25) / processes))  # a quarter of a CPU is what other programs take now and then


def _cpu_times() -> tuple[int, int]:
    """Idle and total ticks of all CPUs since the start."""
    words = _words("/proc/stat")[1:9]  # user nice system idle iowait irq softirq steal
    times = [int(word) for word in words]
    return (times[3] + times[4], sum(times)) if len(times) == 8 else (0, 0)


def _words(path: str) -> tuple[str, ...]:
    try:
        with open(path) as file:
            return tuple(file.read().split())
    except OSError:
        return ()
