"""The trainer's child: what it is told, what the page is told, how it ends. A script stands in for the real trainer."""

import sys
import time

import cv2
import numpy as np
import pytest

from blpseg.annotate import training
from blpseg.annotate.instant import model_path, save_arrays
from blpseg.annotate.predict_all import best_places, worth
from blpseg.annotate.training import Training, scored
from blpseg.utils.errors import BLPSegError

from .conftest import stroke

TRAINER = """
import json, os, signal, sys, time
words = sys.argv[3:]
opts = dict(zip(words[::2], words[1::2]))
out = opts["OUTPUT_DIR"]
os.makedirs(out)
json.dump(opts, open(out + "/opts.json", "w"))
def save(*_):
    open(out + "/model_0000009.pth", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
with open(out + "/metrics.json", "w") as file:
    file.write('{"iteration": 4, "total_loss": 0.5, "time": 2.0, "eval/sem_seg/mIoU": 61.5}\\n')
    file.write('{"iteration": 9, "total_loss": 0.25, "time": 2.0}\\n')
"""
ENDS = {
    "done": "open(out + '/model_final.pth', 'w').close()",
    "failed": "sys.exit('error: no space left <b>')",
    "waits": "print('up', flush=True)\nwhile True: time.sleep(0.05)",
}


@pytest.fixture
def start(project, tmp_path, monkeypatch):
    """``start(end)``: a Training whose trainer ends like that, begun; what is predicted is only noted."""
    project.write(project.photo("a.jpg"), {"strokes": [stroke(1, [30, 30]), stroke(0, [4, 4])]})
    script, predicted = tmp_path / "trainer.py", []
    monkeypatch.setattr(training, "_train_command", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(Training, "_predict", lambda self, weights: predicted.append(weights.name))

    def begin(end, iterations=20):
        script.write_text(TRAINER + ENDS[end])
        made = Training(project)
        made.predicted = predicted
        made.start(iterations)
        return made

    return begin


def wait(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def opts(project, run):
    return training.json.loads((project.root / f"models/{run}/opts.json").read_text())


def test_a_run_and_the_next_one_from_its_weights(start, project):
    first = start("done")
    first._thread.join()
    answer = first.status()
    assert answer["state"] == "done" and (answer["iteration"], answer["iterations"]) == (10, 20)
    assert (answer["loss"], answer["mIoU"], answer["seconds_left"]) == (0.25, 61.5, 20.0)
    assert first.predicted[-1] == "model_final.pth"
    given = opts(project, "run_001")
    assert given["SOLVER.MAX_ITER"] == "20" and given["DATASETS.TEST"] == "()" and "MODEL.WEIGHTS" not in given
    start("done", None)._thread.join()
    again = opts(project, "run_002")
    assert again["MODEL.WEIGHTS"] == str(project.root / "models/run_001/model_final.pth")
    assert again["SOLVER.MAX_ITER"] == "800", "what the config says"
    cv2.imwrite(str(project.root / "masks/val/v.png"), np.zeros((4, 4), np.uint8))
    start("done")._thread.join()
    assert opts(project, "run_003")["DATASETS.TEST"] == '("project_val",)'
    assert sorted(path.name for path in (project.root / "models").iterdir()) == ["run_002", "run_003"]


def test_a_failure_is_told_in_the_trainers_words(start):
    run = start("failed")
    run._thread.join()
    assert run.status()["state"] == "failed" and run.status()["message"] == "no space left <b>"
    assert not run.predicted


def test_a_config_that_cannot_be_used_and_a_defect_are_failures_too(start, project, monkeypatch):
    config = project.config_path.read_text()
    project.config_path.write_text(config.replace("MAX_ITER: 800", "MAX_ITER: many"))
    run = start("done", None)
    run._thread.join()
    assert run.status()["state"] == "failed" and "MAX_ITER 'many' is no whole number" in run.status()["message"]
    monkeypatch.setattr(training, "read_config", lambda path: {}["gone"])
    run.start()
    run._thread.join()
    assert run.status()["state"] == "failed" and "KeyError" in run.status()["message"]
    assert not run.predicted


def test_stopping_keeps_what_was_learned(start, project):
    run = start("waits")
    wait(lambda: run.status()["loss"] == 0.25)
    with pytest.raises(BLPSegError, match="under way"):
        run.start()
    run.stop()
    run._thread.join()
    assert run.status()["state"] == "stopped" and run.predicted == ["model_0000009.pth"]
    run = start("waits")
    wait(lambda: run.status()["loss"] == 0.25 and run._run.name == "run_002")
    run.close()
    assert len(run.predicted) <= 2, "a server that ends predicts nothing any more"


def test_where_a_scribble_teaches_most():
    probability = np.full((3, 30, 40), [[[0.98]], [[0.01]], [[0.01]]])
    probability[:, 5:9, 5:9] = 1 / 3
    probability[:, 20:24, 30:34] = 1 / 3
    annotated = np.zeros((30, 40))
    annotated[5:9, 5:9] = 0.9  # people annotate here anyway
    value = worth(probability, annotated)
    assert value[21, 31] == pytest.approx(1) and value[6, 6] == pytest.approx(0.1) and value[0, 0] < 0.11
    places = best_places(value)
    assert len(places) == 3 and abs(places[0] - (31.5, 21.5)).max() < 2


def test_ranking(project):
    for name, score in (("a", 0.1), ("b c", 0.3), ("d#1", 0.2)):
        save_arrays(model_path(project.root, name), score=np.float32(score), places=np.array([[3, 4]]))
    assert [entry["name"] for entry in scored(project)] == ["b c.png", "d#1.png", "a.jpg"]
    assert scored(project)[0]["places"] == [[3, 4]]
    project.write(project.photo("b c.png"), {"strokes": [stroke(1, [3, 3])]})  # since then: not known
    assert [entry["score"] for entry in scored(project)] == [pytest.approx(0.2), pytest.approx(0.1), None]
