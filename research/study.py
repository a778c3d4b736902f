"""A study: a grid of data sets, methods and seeds; each run is a training in a process of its own."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial

import torch
from detectron2.evaluation.testing import flatten_results_dict

from blpseg import get_cfg
from blpseg.checkpoint import provenance
from blpseg.utils.errors import BLPSegError, describe
from blpseg.utils.files import lock_file, write_bytes_atomic, write_csv
from blpseg.utils.parallel import die_with
from blpseg.utils.yaml_files import read_yaml

ROWS, CURVES = "runs.csv", "curves.csv"
TRAIN = (sys.executable, "tools/train_net.py")
_KEYS = ("config", "options", "seeds", "metrics", "reference", "upper_bound", "compare", "data", "methods")
_DATA_KEYS = ("config", "options", "root", "prepare", "methods", "upper_bound_of")
Key = tuple[str, str, int]  # data set, method, seed


@dataclass(frozen=True)
class Run:
    """One training and its evaluation; ``root`` is its DETECTRON2_DATASETS, ``folder`` its place in the study's."""

    key: Key
    config: str
    options: tuple[str, ...]
    root: str

    def __str__(self) -> str:
        return " | ".join(map(str, self.key))

    @property
    def folder(self) -> str:
        names = (re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_.") or "_" for name in self.key[:2])
        return os.path.join("runs", *names, f"seed{self.key[2]}")


@dataclass(frozen=True)
class Study:
    """What :func:`load_study` reads.

    Attributes:
        metrics: column -> "task/metric" of the final evaluation, or "train/NAME" for the mean of a scalar over the last
            tenth of its lines in metrics.json. Differences are shown for the first two, curves for the first.
        methods: name -> the seeds that it runs with.
        bounds: data set -> the data set whose upper bound its shares are of.
        prepare: data set -> the commands that make it.
        runs: the grid, seeds outermost, so that a study that was cut short has whole comparisons.
    """

    metrics: dict[str, str]
    reference: str
    upper_bound: str
    compare: list[list[str]]
    methods: dict[str, list[int]]
    bounds: dict[str, str]
    prepare: dict[str, list[list[str]]]
    runs: list[Run]


def load_study(path: str, output: str, opts: Sequence[str] = ()) -> Study:
    """Read a study file, whose keys research/README.md describes; ``{output}`` in it is the study's folder.

    ``opts``, config keys and values in turn, are above the options of the study and of its data, not of a method.

    Raises:
        BLPSegError: it cannot be read, or a key or a name is unknown or missing. :func:`check_configs` checks the rest.
    """
    content = _mapping(read_yaml(path), path, _KEYS)
    if missing := [key for key in ("seeds", "metrics", "data", "methods") if not content.get(key)]:
        raise BLPSegError(f"{path}: {', '.join(missing)} missing")
    if len(opts) % 2:
        raise BLPSegError(f"--opts takes config keys and values in turn; {opts[-1]} has no value")
    entries = {n: _mapping(e, f"{path}: methods: {n}") for n, e in _mapping(content["methods"], path).items()}
    methods = {n: _seeds(e.pop("seeds", content["seeds"]), f"{path}: {n}: seeds") for n, e in entries.items()}
    data = {n: _mapping(e, f"{path}: data: {n}", _DATA_KEYS) for n, e in _mapping(content["data"], path).items()}
    compare = [_known(pair, methods, f"{path}: compare", 2) for pair in content.get("compare") or []]
    bounds = {n: _known([e.get("upper_bound_of", n)], data, f"{path}: {n}: upper_bound_of")[0] for n, e in data.items()}
    prepare = {n: _fill([shlex.split(str(c)) for c in e.get("prepare") or []], output) for n, e in data.items()}
    reference = content.get("reference", next(iter(methods)))
    reference, upper_bound = _known([reference, content.get("upper_bound", reference)], methods, path)
    runs: list[Run] = []
    for name, entry in data.items():
        where, config = f"{path}: data: {name}", entry.get("config", content.get("config"))
        if not isinstance(config, str):
            raise BLPSegError(f"{where}: config must be the path of a config file, here or for the whole study")
        common = _mapping(content.get("options"), path) | _mapping(entry.get("options"), where)
        common |= dict(zip(opts[::2], opts[1::2], strict=True))
        root = _fill(str(entry.get("root") or ""), output)
        for method in _known(entry.get("methods", list(methods)), methods, f"{where}: methods"):
            given = [str(_fill(x, output)) for pair in {**common, **entries[method]}.items() for x in pair]
            runs += [Run((name, method, s), config, (*given, "SEED", str(s)), root) for s in methods[method]]
    runs.sort(key=lambda run: run.key[2])  # stable: data sets and methods stay in order
    if len({run.folder for run in runs}) < len(runs):
        raise BLPSegError(f"{path}: two data sets or methods would share a folder; rename one")
    metrics = {column: str(metric) for column, metric in _mapping(content["metrics"], f"{path}: metrics").items()}
    return Study(metrics, reference, upper_bound, compare, methods, bounds, prepare, runs)


def check_configs(study: Study) -> None:
    """Build the config of every data set and method, so that a mistake is found before the first run starts."""
    for run in {run.key[:2]: run for run in study.runs}.values():
        try:
            get_cfg(run.config, list(run.options))
        except BLPSegError as error:
            raise BLPSegError(f"{run}: {error}") from error


def _mapping(entry, where: str, keys: Sequence[str] = ()) -> dict:
    """``entry`` with strings as keys, of which YAML reads some as numbers; only those in ``keys`` if there are any."""
    if not isinstance(entry, dict) and entry is not None:
        raise BLPSegError(f"{where}: expected names with values, found {type(entry).__name__}")
    entry = {str(key): value for key, value in (entry or {}).items()}
    if unknown := [key for key in entry if keys and key not in keys]:
        raise BLPSegError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(keys)}")
    return entry


def _known(names, known, where: str, count: int | None = None) -> list[str]:
    if not isinstance(names, list) or (count and len(names) != count):
        raise BLPSegError(f"{where}: expected a list{f' of {count} names' if count else ''}, found {names!r}")
    if unknown := [str(name) for name in names if str(name) not in known]:
        raise BLPSegError(f"{where}: {unknown[0]!r} is not in the study; it has {', '.join(known)}")
    return [str(name) for name in names]


def _seeds(seeds, where: str) -> list[int]:
    if isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds):
        return list(dict.fromkeys(seeds))
    raise BLPSegError(f"{where} must be a list of whole numbers from 0 on, e.g. [0, 1, 2]")


def _fill(value, output: str):
    if isinstance(value, list):
        return [_fill(item, output) for item in value]
    data = os.environ.get("DETECTRON2_DATASETS", "datasets")
    return value.replace("{output}", output).replace("{data}", data) if isinstance(value, str) else value


def read_rows(path: str) -> dict[Key, list[dict[str, str]]]:
    """The rows of a study's CSV file by data set, method and seed; none if there is no such file."""
    rows: dict[Key, list[dict[str, str]]] = {}
    if os.path.exists(path):
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                for row in csv.DictReader(file):
                    rows.setdefault((row["data"], row["method"], int(row["seed"])), []).append(row)
        except (UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
            raise BLPSegError(f"{path}: not a study's CSV file, with data, method and seed in each row") from error
    return rows


def write_rows(path: str, rows: list[dict]) -> None:
    """Write a CSV file with a column for every key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(path, [columns, *([row.get(column) for column in columns] for row in rows)])


def run_study(study: Study, output: str, *, jobs: int = 1, threads: int = 1, command: Sequence[str] = TRAIN) -> int:
    """Run what is not done yet, ``jobs`` at a time, and keep ``runs.csv`` and ``curves.csv`` in ``output`` up to date.

    A run is done when its row has its config and options and a value in every column. One that was interrupted goes on
    from its newest checkpoint. A run that fails is reported, and the others go on. ``command`` takes the flags of
    tools/train_net.py.

    Returns:
        exit status: 0 all done, 1 a run failed, 128 + signal after SIGINT or SIGTERM.

    Raises:
        BLPSegError: a config is wrong, another process runs the study, or a data set cannot be made.
    """
    check_configs(study)
    os.makedirs(output, exist_ok=True)
    lock = lock_file(os.path.join(output, ".lock"))
    if lock is None:
        raise BLPSegError(f"{output}: another process runs this study; wait, or choose another --output")
    with lock:
        pool = _Pool(study, output, threads, command)
        pending = [run for run in study.runs if not pool.is_done(run)]
        print(f"{len(study.runs)} runs, {len(study.runs) - len(pending)} done; {jobs} at a time", flush=True)
        for name, root in {run.key[0]: run.root for run in pending}.items():
            for words in study.prepare[name]:
                print(f"{name}: {shlex.join(words)}", flush=True)
                environment = {**os.environ, **({"DETECTRON2_DATASETS": root} if root else {})}
                if status := subprocess.run([sys.executable, *words], env=environment).returncode:
                    raise BLPSegError(f"data set {name}: `{shlex.join(words)}` ended with status {status}")
        return pool.work(pending, list(range(jobs)))


class _Pool:
    """Child processes that train, and the CSV files of what they have done."""

    def __init__(self, study: Study, output: str, threads: int, command: Sequence[str]):
        self.study, self.output, self.threads, self.command = study, output, threads, command
        self.rows, self.curves = (read_rows(os.path.join(output, name)) for name in (ROWS, CURVES))
        self.versions = provenance()  # of the code as it is now, whatever is committed while the study runs

    def is_done(self, run: Run) -> bool:
        row = self.rows.get(run.key, [{}])[-1]
        same = row.get("config") == run.config and row.get("options") == shlex.join(run.options)
        return same and all(row.get(column) for column in self.study.metrics)

    def work(self, pending: list[Run], slots: list[int]) -> int:
        running: dict[subprocess.Popen, tuple[Run, int, float]] = {}
        failed = False
        previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while pending or running:
                while pending and slots:
                    run, slot = pending.pop(0), slots.pop(0)
                    running[self._start(run, slot)] = run, slot, time.monotonic()
                time.sleep(0.05)
                for process in [process for process in running if process.poll() is not None]:
                    run, slot, began = running.pop(process)
                    slots.append(slot)
                    try:
                        self._finish(run, process.returncode, time.monotonic() - began)
                    except BLPSegError as error:
                        failed = True
                        print(f"FAILED {run}: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt as stop:
            print("interrupted; the same command goes on", file=sys.stderr, flush=True)
            return 128 + stop.args[0]
        finally:
            for process in running:
                process.terminate()  # it saves its state
            for process, (run, _, began) in running.items():
                process.wait()
                self._spend(run, time.monotonic() - began)
            for number, handler in previous.items():
                signal.signal(number, handler)
        return int(failed)

    def _start(self, run: Run, slot: int) -> subprocess.Popen:
        folder = os.path.join(self.output, run.folder)
        os.makedirs(folder, exist_ok=True)
        given, before = [run.config, *run.options], _read_json(os.path.join(folder, "run.json"))
        if (before["given"] != given) if before else os.listdir(folder):
            raise BLPSegError(f"{folder}: holds a run with other options; move it away, or choose another --output")
        self._note(folder, given, before["seconds"] if before else 0.0)
        environment = dict(os.environ, OMP_NUM_THREADS=str(self.threads), OPENCV_FOR_THREADS_NUM=str(self.threads))
        if run.root:
            environment["DETECTRON2_DATASETS"] = run.root
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % len(visible.split(","))]
        words = [*self.command, "--config-file", run.config, "--resume", *run.options, "OUTPUT_DIR", folder]
        with open(os.path.join(folder, "console.txt"), "a") as log:
            # In a session of its own, where Ctrl-C does not reach it twice.
            ends = partial(die_with, os.getpid())
            return subprocess.Popen(
                words, stdout=log, stderr=log, env=environment, start_new_session=True, preexec_fn=ends
            )

    def _note(self, folder: str, given: list[str], seconds: float) -> None:
        content = json.dumps({"given": given, "seconds": seconds})
        write_bytes_atomic(os.path.join(folder, "run.json"), content.encode())

    def _spend(self, run: Run, seconds: float) -> float:
        """Add to the seconds that a run has taken, over all starts of the study, and return them."""
        folder = os.path.join(self.output, run.folder)
        total = seconds + _read_json(os.path.join(folder, "run.json"))["seconds"]
        self._note(folder, [run.config, *run.options], total)
        return total

    def _finish(self, run: Run, status: int, seconds: float) -> None:
        folder = os.path.join(self.output, run.folder)
        total = self._spend(run, seconds)
        if status:
            raise BLPSegError(f"{_last_line(os.path.join(folder, 'console.txt'))} (status {status}; see {folder})")
        scores, curve, iterations = _measured(self.study.metrics, folder)
        gpu = torch.cuda.is_available() and get_cfg(run.config, list(run.options)).MODEL.DEVICE != "cpu"
        key = dict(zip(("data", "method", "seed"), run.key, strict=True))
        row = {
            **key, **scores, "iterations": iterations, "seconds": round(total, 1), "config": run.config,
            "options": shlex.join(run.options), "root": run.root,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "git_revision": self.versions["git_revision"], "torch": self.versions["torch"],
            "device": torch.cuda.get_device_name() if gpu else "cpu", "threads": self.threads,
        }  # fmt: skip
        self.rows[run.key], self.curves[run.key] = [row], [{**key, **point} for point in curve]
        order = dict.fromkeys([*(run.key for run in self.study.runs), *self.rows])
        # The rows last: a run whose row is there has its curve too, wherever this is cut off.
        for name, table in ((CURVES, self.curves), (ROWS, self.rows)):
            write_rows(os.path.join(self.output, name), [row for key in order for row in table.get(key, ())])
        said = ", ".join(f"{column} {value}" for column, value in scores.items())
        print(f"[{sum(map(self.is_done, self.study.runs))}/{len(self.study.runs)}] {run}: {said}", flush=True)


def _interrupt(number, frame):
    raise KeyboardInterrupt(int(number))


def _last_line(path: str) -> str:
    """The last error of a run's output, or its last line."""
    with open(path, errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()] or ["it printed nothing"]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])


def _read_json(path: str):
    """None where there is no file, or one that was cut short."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return None


def _measured(metrics: dict[str, str], folder: str) -> tuple[dict[str, str], list[dict], int]:
    """Column -> value of a finished run, the evaluations on the way, and the number of iterations.

    A value is "nan" where the data set has no such task, or the metric is no number.
    """
    try:
        with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as file:
            lines = sorted(map(json.loads, filter(str.strip, file)), key=lambda line: line["iteration"])
        with open(os.path.join(folder, "results.json"), encoding="utf-8") as file:
            results = json.load(file)
        found = flatten_results_dict(next(iter(results.values())) if len(results) == 1 else results)
    except (OSError, ValueError, KeyError) as error:
        raise BLPSegError(f"{folder}: {describe(error)}; delete the folder and start the study again") from error
    tasks, points = {name.rsplit("/", 1)[0] for name in found}, {}
    for column, metric in metrics.items():
        if metric.startswith("train/"):
            logged = [line[metric[6:]] for line in lines if metric[6:] in line]
            tail = logged[-max(1, len(logged) // 10) :]  # one step is one batch
            found[metric] = sum(tail) / len(tail) if tail else None
        elif metric not in found and metric.rsplit("/", 1)[0] in tasks:  # a typo
            raise BLPSegError(f"no {metric} among the scores: correct the study file; there are {', '.join(found)}")
        for line in lines:
            if (value := line.get(f"eval/{metric}", line.get(metric))) is not None:
                point = points.setdefault(line["iteration"] + 1, {"iteration": line["iteration"] + 1})
                point[column] = f"{value:.4f}"
    scores = {c: "nan" if found.get(m) is None else f"{found[m]:.4f}" for c, m in metrics.items()}
    return scores, [points[iteration] for iteration in sorted(points)], lines[-1]["iteration"] + 1
