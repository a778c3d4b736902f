"""Training in the loop: the project's own trainer in a child process, and then its predictions of all photos."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..data.project import list_images, read_config
from ..utils.errors import BLPSegError, one_line
from .instant import model_path
from .store import Project

MOST_ITERATIONS = 1_000_000
_KEPT_RUNS = 2
_ITERATIONS = 800  # where the config names none
_LINES = 50  # of progress in a run


class Training:
    """At most one run at a time; each starts from the weights of the run before it."""

    def __init__(self, project: Project):
        self.project = project
        self.models = project.root / "models"
        self._marker = project.root / ".cache/model/made_from"  # which weights the predictions come from
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._thread: threading.Thread | None = None
        self._asked_to_stop = self._closing = False
        self._state = "idle"
        self._message = ""
        self._run: Path | None = None
        self._iterations = self._predicted = self._passes = 0
        weights = self.weights()
        if weights and not (self._marker.exists() and self._marker.read_text() == _identity(weights)):
            self._begin(lambda: self._predict(weights))

    def weights(self) -> Path | None:
        """The newest checkpoint in ``PROJECT/models``, whoever trained it; None before the first."""
        return _newest([*self.models.glob("model_*.pth"), *self.models.glob("*/model_*.pth")])

    def start(self, iterations: int | None = None) -> None:
        """Begin to train on all strokes so far.

        Args:
            iterations: of this run; by default the config's SOLVER.MAX_ITER.

        Raises:
            BLPSegError: it trains already, nothing or one class alone is scribbled, or a wrong number of iterations.
        """
        if iterations is not None and (type(iterations) is not int or not 1 <= iterations <= MOST_ITERATIONS):
            raise BLPSegError(f"iterations {str(iterations)[:40]!r} is no whole number within 1..{MOST_ITERATIONS}")
        drawn = {stroke["class"] for photo in self.project.photos.values() if photo.count
                 for stroke in self.project.read(photo)["strokes"]}  # fmt: skip
        if len(drawn) < 2:
            raise BLPSegError("draw strokes of two classes or more before training")
        self._begin(lambda: self._train(iterations))

    def stop(self) -> None:
        """End what is under way; the trainer saves its state first."""
        with self._lock:
            self._asked_to_stop = True
            if self._child and self._child.poll() is None:
                self._child.terminate()

    def close(self) -> None:
        """Stop, and wait for the end."""
        self._closing = True
        self.stop()
        if self._thread:
            self._thread.join()

    def status(self) -> dict:
        """What the page shows: ``state`` is idle, training, predicting, done, stopped or failed."""
        answer = {"state": self._state, "message": self._message, "iteration": 0, "iterations": self._iterations,
                  "seconds_left": None, "loss": None, "mIoU": None, "predicted": self._predicted,
                  "models": self._passes}  # fmt: skip
        for line in _lines(self._run / "metrics.json" if self._run else None):
            iteration = line.get("iteration", 0) + 1
            if "total_loss" in line:
                answer |= {"iteration": iteration, "loss": line["total_loss"]}
            if "time" in line:
                answer["seconds_left"] = max(0.0, line["time"] * (self._iterations - iteration))
            score = next((v for k, v in line.items() if k.startswith("eval/") and k.endswith("sem_seg/mIoU")), None)
            answer["mIoU"] = answer["mIoU"] if score is None else score
        return answer

    def _begin(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._thread and self._thread.is_alive():
                raise BLPSegError("a training run is under way; wait for it, or stop it")
            self._asked_to_stop, self._message = False, ""
            self._thread = threading.Thread(target=self._guarded, args=(job,), daemon=True)
            self._state = "training"
            self._thread.start()

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
            self._state, self._message = ("stopped", "stopped") if self._asked_to_stop else ("done", "")
        except Exception as error:  # nobody else would see it, and the page would show "training" for ever
            self._state, self._message = "failed", one_line(error)

    def _train(self, iterations: int | None) -> None:
        start, self._run = self.weights(), self._new_run()
        config = read_config(self.project.config_path)
        self._iterations = iterations or (config.get("SOLVER") or {}).get("MAX_ITER") or _ITERATIONS
        if type(self._iterations) is not int:
            raise BLPSegError(
                f"{self.project.config_path}: SOLVER.MAX_ITER {self._iterations!r} is no whole number; correct it"
            )
        masks = self.project.root / "masks/val"
        tested = masks.is_dir() and list_images(masks)
        opts = {
            "OUTPUT_DIR": str(self._run),
            "DATASETS.FOLDER.ROOT": str(self.project.root),
            "SOLVER.MAX_ITER": self._iterations,
            "SOLVER.CHECKPOINT_PERIOD": max(100, self._iterations // 4),
            "OUTPUT.LOG_PERIOD": max(1, self._iterations // _LINES),
            "OUTPUT.PANEL_PERIOD": 0,
            "DATASETS.TEST": f'("{config["DATASETS"]["FOLDER"]["NAME"]}_val",)' if tested else "()",
            "TEST.EVAL_PERIOD": max(1, self._iterations // 4),
        }
        if start:  # class layers of another shape, where classes have come since, start anew
            opts |= {"MODEL.WEIGHTS": str(start), "MODEL.BLPSEG.RESET_CLASS_LAYERS": True}
        command = [*_train_command(), "--config-file", str(self.project.config_path)]
        finished = self._call([*command, *(str(part) for pair in opts.items() for part in pair)])
        made = _newest(self._run.glob("model_*.pth"))
        if made and not self._closing:
            self._asked_to_stop = False  # what is learned so far counts
            self._predict(made)
            self._asked_to_stop |= not finished

    def _predict(self, weights: Path) -> None:
        self._state, self._predicted = "predicting", 0
        arguments = [str(self.project.config_path), str(weights), str(self.project.root)]
        if self._call([sys.executable, "-W", "ignore", "-m", "blpseg.annotate.predict_all", *arguments]):
            self._marker.write_text(_identity(weights))
            self._passes += 1

    def _call(self, command: Sequence[str]) -> bool:
        """Run a child to its end, below the server in priority; False if it was stopped.

        Raises:
            BLPSegError: it failed; its last line says why.
        """
        nice = ["nice", "-n", "5"] if shutil.which("nice") else []
        with self._lock:
            if self._asked_to_stop:
                return False
            self._child = subprocess.Popen(
                [*nice, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        last = ""
        for line in self._child.stdout:
            last = line.strip() or last
            self._predicted += self._state == "predicting" and not line.startswith("left out")
        status = self._child.wait()
        if status and not self._asked_to_stop:
            raise BLPSegError(last.removeprefix("error: ") or f"the process ended with status {status}")
        return not status

    def _new_run(self) -> Path:
        runs = sorted(path for path in self.models.glob("run_*") if re.fullmatch(r"run_\d{3,}", path.name))
        for old in runs[: -_KEPT_RUNS + 1 or None]:
            shutil.rmtree(old)  # ours, and a later run goes on from what it had learned
        number = int(runs[-1].name[4:]) + 1 if runs else 1
        return self.models / f"run_{number:03}"


def scored(project: Project) -> list[dict]:
    """Photos by what a scribble on them would teach, the most first.

    Returns:
        ``{"name", "score", "places"}`` each: the mean of :func:`.predict_all.worth` and [x, y] where it is largest.
        Without a model the score is None, and photos without strokes come first; so it is for photos that were
        scribbled on since the model saw them.
    """
    answer = []
    for photo in project.photos.values():
        path, strokes = Path(model_path(project.root, photo.stem)), project.strokes_path(photo)
        entry = {"name": photo.name, "score": None, "places": []}
        newer = strokes.exists() and path.exists() and strokes.stat().st_mtime_ns > path.stat().st_mtime_ns
        if path.exists() and not newer:
            with np.load(path, allow_pickle=False) as arrays:
                entry |= {"score": float(arrays["score"]), "places": arrays["places"].tolist()}
        answer.append((entry["score"] is None, -(entry["score"] or 0), photo.count > 0, entry))
    return [entry for *_, entry in sorted(answer, key=lambda item: item[:3])]


def _train_command() -> list[str]:
    """The trainer of this clone, or of the installed package."""
    script = Path(__file__).resolve().parents[2] / "tools/train_net.py"
    target = [str(script)] if script.is_file() else ["-m", "blpseg.tools.train_net"]
    return [sys.executable, "-W", "ignore", *target]


def _newest(checkpoints: Iterable[Path]) -> Path | None:
    return max(checkpoints, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def _lines(path: Path | None) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path else []
    except (OSError, ValueError):
        return []  # not there yet, or a line that is being written


def _identity(path: Path) -> str:
    return f"{path} {path.stat().st_mtime_ns}"
