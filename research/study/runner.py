"""Runs a study's grid in several processes; what is done stays done when it is interrupted."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from datetime import datetime, timedelta, timezone

import torch
from detectron2.evaluation.testing import flatten_results_dict

from blpseg.checkpoint import provenance
from blpseg.utils.cli import run_command
from blpseg.utils.errors import BLPSegError, describe
from blpseg.utils.files import write_bytes_atomic

from .plan import Run, Study

__all__ = ["CURVES", "ROWS", "measured", "read_rows", "row_key", "run_study"]

ROWS, CURVES, LOG = "runs.csv", "curves.csv", "console.txt"
_DONE = "done.json"  # in a run's folder: the digest of what was run there
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_study(study: Study, output: str, *, jobs: int = 1, threads: int = 1) -> int:
    """Run what is not done yet and keep ``runs.csv`` and ``curves.csv`` in ``output`` up to date.

    A run counts as done while its row's digest is that of its config and data. An interrupted one goes on from its
    newest checkpoint; one whose config has changed starts anew. A run that fails is named and the others go on.

    Args:
        study: from :func:`load_study`, with the same ``output``.
        output: folder of the study.
        jobs: runs at a time; with GPUs they are shared out in turn.
        threads: CPU threads of each run.

    Returns:
        exit status: 0 all done, 1 a run failed, 128 + signal when one ended it.

    Raises:
        BLPSegError: another process runs the study, or a data set cannot be made.
    """
    os.makedirs(output, exist_ok=True)
    with open(os.path.join(output, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BLPSegError(f"{output}: another process runs this study; wait, or choose another --output") from error
        path = os.path.join(output, ROWS)
        found = {row_key(row, path): row for row in read_rows(path)}
        blank = _blank_columns(study, found)  # a mistake in the study file, perhaps mended since
        rows = {run.key: found[run.key] for run in study.runs if not blank and _is_done(study, run, found.get(run.key))}
        # What is to be run again loses its digest: the CSV file's columns do not tell what has been measured.
        keys = {run.key for run in study.runs}
        others = {key: row | {"digest": ""} if key in keys else row for key, row in found.items() if key not in rows}
        pending = [run for run in study.runs if run.key not in rows]
        print(f"{len(study.runs)} runs, {len(rows)} done; {jobs} at a time, {threads} thread(s) each", flush=True)
        _prepare(study, {run.data for run in pending})
        return _Pool(study, output, rows, others, jobs, threads).work(pending)


def read_rows(path: str) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; none if there is no such file.

    Raises:
        BLPSegError: it is no CSV file.
    """
    if not os.path.exists(path):
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BLPSegError(f"{path}: not a CSV file: {describe(error)}") from error


def row_key(row: dict[str, str], path: str) -> tuple[str, str, int]:
    """Data set, method and seed of a row of ``path``.

    Raises:
        BLPSegError: the row has none of these.
    """
    try:
        return row["data"], row["method"], int(row["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise BLPSegError(f"{path}: not a study's CSV file, with data, method and seed in each row") from error


def measured(study: Study, row: dict[str, str]) -> set[str]:
    """The columns of the study in which a row has what the study file says they hold; blanks count."""
    try:
        found = json.loads(row.get("metrics") or "null")
    except ValueError:  # edited by hand: as if nothing had been measured
        return set()
    if isinstance(found, dict):
        return {column for column, metric in study.columns.items() if found.get(column) == metric}
    return study.columns.keys() & row.keys()  # of a version that did not keep them


def _blank_columns(study: Study, rows: dict) -> list[str]:
    """Columns in which no row has a value."""
    return [column for column in study.columns if not any(row.get(column) for row in rows.values())]


def _is_done(study: Study, run: Run, row: dict | None) -> bool:
    # What the study file measures otherwise since then is had by evaluating again; training is then found complete.
    return row is not None and row.get("digest") == run.digest and measured(study, row) == study.columns.keys()


def _prepare(study: Study, names: set[str]) -> None:
    for name in study.data:
        for command in study.data[name].prepare if name in names else ():
            print(f"{name}: {shlex.join(command)}", flush=True)
            environment = dict(os.environ)
            if study.data[name].root:
                environment["DETECTRON2_DATASETS"] = study.data[name].root
            if status := subprocess.run([sys.executable, *command], env=environment).returncode:
                raise BLPSegError(f"data set {name}: `{shlex.join(command)}` ended with status {status}")


class _Pool:
    """Processes that are forked from one which has imported everything, so that each starts at once."""

    def __init__(self, study: Study, output: str, rows: dict, others: dict, jobs: int, threads: int):
        self.study, self.output, self.rows, self.threads = study, output, rows, threads
        self.others = others  # of what the study file no longer names, or what is to be run again; they stay till then
        self.slots = list(range(jobs))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["blpseg.study.runner", "blpseg.engine.train", "blpseg.evaluation"])
        self.gpus = torch.cuda.device_count()
        # Of the code that is loaded now, whatever is committed while the study runs.
        self.versions = provenance()
        self.curves: dict = {}
        for row in read_rows(os.path.join(output, CURVES)):
            self.curves.setdefault(row_key(row, CURVES), []).append(row)
        self.running: dict = {}  # process -> (run, slot, start)
        self.failed: list[tuple[Run, str]] = []
        self.signum = 0
        self.told: set[str] = set()  # columns whose first blank has been told

    def work(self, pending: list[Run]) -> int:
        pending, total, start = list(pending), len(pending), time.monotonic()
        previous = {signum: signal.signal(signum, self._stop) for signum in _SIGNALS}
        try:
            while self.running or (pending and not self.signum):
                while pending and self.slots and not self.signum:
                    self._start(pending.pop(0))
                multiprocessing.connection.wait([p.sentinel for p in self.running], timeout=0.5)
                for process in [p for p in self.running if not p.is_alive()]:
                    self._finish(process, total, start)
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
            for process in self.running:
                process.kill()
        if self.signum:
            counts = f"{len(self.rows)} of {len(self.study.runs)} runs done"
            print(f"interrupted, {counts}; the same command goes on", file=sys.stderr)
            return 128 + self.signum
        for run, why in self.failed:
            print(f"failed: {' | '.join(map(str, run.key))}: {why}; see {self._log(run)}", file=sys.stderr)
        blank = _blank_columns(self.study, self.rows) if self.rows else []
        if blank:
            names = ", ".join(f"{column} ({self.study.columns[column]})" for column in blank)
            print(f"error: no run has a value of {names}: correct the study file, start again", file=sys.stderr)
        return int(bool(self.failed or blank))

    def _stop(self, signum, frame) -> None:
        self.signum = self.signum or signum
        for process in self.running:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    def _log(self, run: Run) -> str:
        return os.path.join(self.output, run.folder, LOG)

    def _start(self, run: Run) -> None:
        slot = self.slots.pop(0)
        gpu = slot % self.gpus if self.gpus else None
        folder = os.path.join(self.output, run.folder)
        process = self.context.Process(target=_child, args=(run, folder, self._log(run), self.threads, gpu))
        process.start()
        self.running[process] = run, slot, time.monotonic()
        if self.signum:  # it came while the process started, which has not heard it
            os.kill(process.pid, signal.SIGTERM)

    def _finish(self, process, total: int, start: float) -> None:
        process.join()
        run, slot, began = self.running.pop(process)
        self.slots.append(slot)
        if process.exitcode:
            if not self.signum:
                self._fail(run, self._last_line(run, process.exitcode))
            return
        folder = os.path.join(self.output, run.folder)
        try:
            row, curve = _row(self.study, run, folder), _curve(self.study, run, folder)
        except BLPSegError as error:
            self._fail(run, str(error))
            return
        row |= {
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "git_revision": self.versions["git_revision"],
            "torch": self.versions["torch"],
            "device": _read_json(os.path.join(folder, _DONE))["device"],
            "threads": self.threads,
        }
        self.curves[run.key] = curve
        self.rows[run.key] = row
        self.others.pop(run.key, None)
        rows = self._in_order()
        curves = [point for row in rows for point in self.curves.get(row_key(row, ROWS), ())]
        # Rows last: a run whose row is there has its curve too, wherever this is cut off.
        _write_csv(os.path.join(self.output, CURVES), curves)
        _write_csv(os.path.join(self.output, ROWS), rows)
        over = total - sum(r.key not in self.rows for r in self.study.runs)
        left = (time.monotonic() - start) / over * (total - over - len(self.failed))
        scores = ", ".join(f"{name} {row[name]}" for name in self.study.columns)
        print(
            f"[{len(self.rows)}/{len(self.study.runs)}] {' | '.join(map(str, run.key))}: {scores} "
            f"({time.monotonic() - began:.0f} s; about {timedelta(seconds=round(left))} left)",
            flush=True,
        )
        # Another data set may have it; a typo should not wait for the end of the grid.
        for column in [c for c in self.study.columns if not row[c] and c not in self.told]:
            self.told.add(column)
            print(f"no {column} ({self.study.columns[column]}) in {' | '.join(map(str, run.key))}", flush=True)

    def _fail(self, run: Run, why: str) -> None:
        self.failed.append((run, why))
        print(f"FAILED {' | '.join(map(str, run.key))}: {why}", flush=True)

    def _in_order(self) -> list[dict]:
        return [self.rows[run.key] for run in self.study.runs if run.key in self.rows] + [*self.others.values()]

    def _last_line(self, run: Run, status: int) -> str:
        if status < 0:
            return f"killed by signal {-status}"
        if not os.path.exists(self._log(run)):
            return f"exit status {status} before it began"
        with open(self._log(run), errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [f"exit status {status}"])[-1]


def _child(run: Run, folder: str, log: str, threads: int, gpu: int | None) -> None:
    from blpseg.engine.launch import die_with

    die_with(os.getppid())
    os.makedirs(folder, exist_ok=True)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if run.root:
        os.environ["DETECTRON2_DATASETS"] = run.root
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    torch.set_num_threads(threads)
    import cv2

    cv2.setNumThreads(threads)
    run_command(_train_and_evaluate, run, folder)


def _train_and_evaluate(run: Run, folder: str) -> int:
    from blpseg.engine import run as run_engine

    done = os.path.join(folder, _DONE)
    before = _read_json(done)
    resume = before is not None and before.get("digest") == run.digest
    if not resume:
        # First what another config left: were this process killed in between, it would pass for this one's.
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif name != LOG:
                os.remove(path)
        write_bytes_atomic(done, json.dumps({"digest": run.digest, "seconds": 0.0}).encode())
    begun = time.monotonic()
    arguments = {
        "config_file": run.config, "resume": resume, "overwrite": not resume, "eval_only": False, "replay": "",
        "trust_checkpoint": False, "num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto",
    }  # fmt: skip
    try:
        if status := run_engine(Namespace(**arguments, opts=[*run.options, "OUTPUT_DIR", folder])):
            return status
    finally:
        seconds = (before["seconds"] if resume else 0.0) + time.monotonic() - begun
        on_gpu = torch.cuda.is_available() and run.cfg().MODEL.DEVICE.startswith("cuda")
        device = torch.cuda.get_device_name() if on_gpu else "cpu"
        write_bytes_atomic(done, json.dumps({"digest": run.digest, "seconds": seconds, "device": device}).encode())
    # Again with the report: distances and thicknesses are too slow for every evaluation on the way.
    final = ["MODEL.WEIGHTS", os.path.join(folder, "model_final.pth"), "TEST.REPORT.ENABLED", "True"]
    final += ["OUTPUT_DIR", os.path.join(folder, "final")]
    arguments |= {"eval_only": True, "resume": False, "overwrite": False}
    return run_engine(Namespace(**arguments, opts=[*run.options, *final]))


def _read_json(path: str):
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError:  # cut short: as if it were not there
        return None


def _scalars(folder: str) -> list[dict]:
    path = os.path.join(folder, "metrics.json")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.strip()]
        if not lines:
            raise ValueError("empty")
        return lines
    except (OSError, ValueError) as error:
        raise BLPSegError(
            f"{path}: missing or damaged ({describe(error)}); delete the run's folder and start again"
        ) from error


def _row(study: Study, run: Run, folder: str) -> dict:
    """What a finished run's files say of it.

    Raises:
        BLPSegError: they are not there, or lack a metric of the study.
    """
    path = os.path.join(folder, "final", "results.json")
    results = _read_json(path)
    if not results:
        raise BLPSegError(f"{path}: missing or cut short; start the study again, which evaluates again")
    if len(results) > 1:
        raise BLPSegError(f"{path}: scores of {', '.join(results)}; a run of a study has one data set in DATASETS.TEST")
    values = flatten_results_dict(next(iter(results.values())))
    # A task that this data set's evaluators do not have leaves a blank; a metric that the task does not have is a typo.
    tasks = {name.split("/")[0] for name in values}
    if missing := [m for m in study.columns.values() if m.split("/")[0] in tasks and m not in values]:
        raise BLPSegError(
            f"no {', '.join(missing)} among the scores: correct the study file; there are {', '.join(values)}"
        )
    lines = _scalars(folder)
    for metric in study.columns.values():
        if metric.startswith("train/"):
            logged = [line[metric[6:]] for line in lines if metric[6:] in line]
            # One step is one batch; the last tenth of the run tells where it ended.
            tail = logged[-max(1, len(logged) // 10) :]
            values[metric] = sum(tail) / len(tail) if tail else None
    row: dict = {"data": run.data, "method": run.method, "seed": run.seed}
    for column, metric in study.columns.items():
        row[column] = _cell(values.get(metric))
    return row | {
        "iterations": max(line["iteration"] for line in lines) + 1,
        "seconds": round(_read_json(os.path.join(folder, _DONE))["seconds"], 1),
        "config": run.config,
        "options": shlex.join(run.options),
        "root": run.root,
        "prepare": "; ".join(shlex.join(command) for command in study.data[run.data].prepare),
        "metrics": json.dumps(study.columns),
        "digest": run.digest,
    }


def _curve(study: Study, run: Run, folder: str) -> list[dict]:
    """The evaluations of a run on the way."""
    points = []
    for entry in _read_json(os.path.join(folder, "evaluations.json")) or ():
        values = flatten_results_dict(entry["results"])
        point = {"data": run.data, "method": run.method, "seed": run.seed, "iteration": entry["iteration"] + 1}
        for name, metric in study.columns.items():
            if metric in values:
                point[name] = _cell(values[metric])
        points.append(point)
    return points


def _cell(value: float | None) -> str:
    """Blank where there is nothing, or a mean over nothing."""
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _write_csv(path: str, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes_atomic(path, text.getvalue().encode())
