"""Threads by what is free; progress in files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from blpseg.utils import threads
from blpseg.utils.progress import progress_bar


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({}, 64),
    ],
)
def test_allowed_cpus(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{text}\n")
    assert threads.allowed_cpus(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("total", "cpus", "busy", "processes", "expected"),
    [
        (2, 2, 0.0, 1, 2),
        (2, 2, 0.2, 1, 2),  # a browser, an editor
        (2, 2, 1.0, 1, 1),
        (2, 2, 2.0, 1, 1),  # at least one
        (8, 8, 0.0, 2, 4),
        (8, 8, 3.0, 1, 5),
        (64, 1.5, 0.0, 1, 1),  # never more than the quota
        (64, 4, 32.0, 1, 2),
    ],
)
def test_choose_threads(monkeypatch, total, cpus, busy, processes, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: total)
    assert threads.choose_threads(processes, cpus, busy) == expected


def test_busy_cpus_by_hand(monkeypatch):
    ticks = iter(["cpu 10 0 10 80 0 0 0 0", "cpu 70 0 20 110 0 0 0 0"])  # 70 of 100 ticks were not idle
    monkeypatch.setattr(threads, "_words", lambda path: tuple(next(ticks).split()))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert threads.busy_cpus(0) == pytest.approx(2.8)


def test_commands_wait_passively():
    code = "import os; from blpseg.utils import cli; cli.run_command(lambda: print(os.environ['OMP_WAIT_POLICY']))"
    for policy in (None, "ACTIVE"):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == (policy or "PASSIVE")


def test_progress_in_a_file(capsys):
    items = progress_bar(range(30), desc="masks", unit="file")
    clock = iter(range(0, 10_000, 10))  # ten seconds a look
    items._time, items.start_t, items.last_print_t = lambda: next(clock), 0, 0
    assert list(items) == list(range(30))
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= 12 and all(line.startswith("masks: ") for line in lines)
    assert "30/30" in lines[-1] and "\r" not in "".join(lines)
