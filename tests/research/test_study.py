"""The study: a grid that is killed and goes on, with a stand-in for the trainer; one real run; the table by hand."""

import csv
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time

import pytest
import yaml

from blpseg.utils.errors import BLPSegError
from datasets.make_synthetic import make_synthetic
from research.study import check_configs, load_study, read_rows, run_study
from research.summary import summarize

from ..conftest import ROOT

METRICS = {"mIoU": "sem_seg/mIoU", "rare": "report/rare_region_mIoU", "loss": "train/loss_seg"}
OFF = {f"MODEL.BLPSEG.{part}.ENABLED": False for part in ("BLP", "LAM", "SELF_TRAINING")}
CONFIG = "configs/Synthetic-Scribble/blpseg_tiny.yaml"

# Takes the flags of tools/train_net.py and leaves its files: ten steps, one from each start where a file says so.
TRAINER = """
import json, os, sys, time
opts = dict(zip(sys.argv[4::2], sys.argv[5::2]))
folder, seed = opts["OUTPUT_DIR"], int(opts["SEED"])
assert sys.argv[1:4:2] == ["--config-file", "--resume"]
steps = os.path.join(folder, "steps")
with open(steps, "a") as file:
    file.write(f"start {os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.environ.get('DETECTRON2_DATASETS')}\\n")
if os.path.exists(os.path.join(folder, "..", "..", "..", "..", "wait")):
    time.sleep(400)
if "MODEL.BLPSEG.BLP.GAMMA" in opts and seed == 1:
    sys.exit("error: no luck")
gain = 10 * (opts["MODEL.BLPSEG.BLP.ENABLED"] == "True")
with open(os.path.join(folder, "metrics.json"), "w") as file:
    for i in range(20):
        file.write(json.dumps({"iteration": i, "loss_seg": 20.0 - i}) + "\\n")
    file.write(json.dumps({"iteration": 9, "eval/sem_seg/mIoU": 30 + seed}) + "\\n")
scores = {"sem_seg": {"mIoU": 40 + seed + gain}, "report": {"rare_region_mIoU": None}}
json.dump({"toy_val": scores}, open(os.path.join(folder, "results.json"), "w"))
"""


def definition(**changes) -> dict:
    return {
        "config": CONFIG, "seeds": [0, 1], "metrics": METRICS, "options": {"SOLVER.MAX_ITER": 4}, "data": {"toy": {}},
        "methods": {"partial CE": OFF, "BLP": {**OFF, "MODEL.BLPSEG.BLP.ENABLED": True}}, **changes,
    }  # fmt: skip


@pytest.fixture
def load(tmp_path, root, monkeypatch):
    """Loads a study file of this content; configs are relative to the project, as for a user."""
    monkeypatch.chdir(root)

    def load(content, *opts):
        path = tmp_path / "study.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return load_study(str(path), str(tmp_path), opts)

    return load


@pytest.fixture
def command(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    return [sys.executable, str(tmp_path / "trainer.py")]


def rows_of(folder) -> list[dict]:
    path = folder / "runs.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def test_killed_and_started_again(tmp_path, load, command, capfd):
    study = load(definition(data={"toy": {"root": "{output}/data"}}))
    first = tmp_path / "runs/toy/partial_CE/seed0/steps"
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        (tmp_path / "wait").touch()
        first.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(
            target=lambda: sys.exit(run_study(study, str(tmp_path), command=command, threads=3))
        )
        process.start()
        deadline = time.monotonic() + 300
        while not first.exists() or not first.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if number == signal.SIGKILL:
            with pytest.raises(BLPSegError, match="another process runs this study"):
                run_study(study, str(tmp_path), command=command)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == status
        trainer = int(first.read_text().split()[1])
        while os.path.exists(f"/proc/{trainer}") and "Z" not in open(f"/proc/{trainer}/stat").read().split(")")[1][:3]:
            assert time.monotonic() < deadline, "the trainer lives on without its study"
            time.sleep(0.02)
    assert "interrupted; the same command goes on" in capfd.readouterr().err
    spent = json.loads((first.parent / "run.json").read_text())["seconds"]
    assert spent > 0  # of the start that SIGTERM ended
    (tmp_path / "wait").unlink()
    assert run_study(study, str(tmp_path), command=command, jobs=2) == 0
    rows = rows_of(tmp_path)
    assert [(r["method"], r["seed"]) for r in rows] == [(m, s) for s in "01" for m in ("partial CE", "BLP")]
    assert [r["mIoU"] for r in rows] == ["40.0000", "50.0000", "41.0000", "51.0000"]
    # The last tenth of 20 losses are 2 and 1; the report of this data set has no number.
    assert {(r["loss"], r["rare"], r["iterations"], r["device"]) for r in rows} == {("1.5000", "nan", "20", "cpu")}
    assert shlex.split(rows[0]["options"])[:2] == ["SOLVER.MAX_ITER", "4"] and rows[0]["config"] == CONFIG
    assert all(r["git_revision"] and r["finished"] and float(r["seconds"]) > 0 for r in rows)
    assert float(rows[0]["seconds"]) > spent - 0.1  # which the CSV file rounds
    assert first.read_text().splitlines()[-1].split()[2:] == ["1", f"{tmp_path}/data"]
    points = read_rows(str(tmp_path / "curves.csv"))
    assert [(p["iteration"], p["mIoU"]) for p in points["toy", "BLP", 1]] == [("10", "31.0000")]
    # What is done is not done again; a method whose options have changed is, in a folder of its own.
    before = first.read_text()
    assert run_study(study, str(tmp_path), command=command) == 0 and first.read_text() == before
    changed = {**definition()["methods"]["BLP"], "MODEL.BLPSEG.BLP.GAMMA": 1.0}
    study = load(definition(data={"toy": {"root": "{output}/data"}}, methods={"BLP": changed, "other": changed}))
    with pytest.raises(BLPSegError, match="BLP/seed0: holds a run with other options; move it away"):
        run_study(study, str(tmp_path), command=command)
    os.rename(tmp_path / "runs/toy/BLP", tmp_path / "away")
    assert run_study(study, str(tmp_path), command=command) == 1
    assert "FAILED toy | BLP | 1: error: no luck (status 1; see " in capfd.readouterr().err
    # The row of the run that failed stays as it was, and so do those that the study no longer names.
    rows = rows_of(tmp_path)
    assert [(r["method"], r["seed"], "GAMMA" in r["options"]) for r in rows] == [
        ("BLP", "0", True), ("other", "0", True), ("BLP", "1", False), ("partial CE", "0", False),
        ("partial CE", "1", False),
    ]  # fmt: skip


def test_a_real_run(tmp_path, load):
    """One training of two steps by tools/train_net.py: its files hold what the study reads."""
    make_synthetic(str(tmp_path / "data/synthetic"), size=(32, 32), train=2, val=1, seed=0)
    options = {
        "SOLVER.MAX_ITER": 2, "SOLVER.IMS_PER_BATCH": 2, "TEST.EVAL_PERIOD": 1, "INPUT.CROP.SIZE": [32, 32],
        "OUTPUT.PANEL_PERIOD": 0, "TEST.REPORT.ENABLED": True, "TEST.REPORT.PANELS": 0, "DATALOADER.NUM_WORKERS": 0,
    }  # fmt: skip
    study = definition(options=options, seeds=[0], methods={"partial CE": OFF})
    study["data"]["toy"]["root"] = "{output}/data"
    study = load(study)
    assert run_study(study, str(tmp_path)) == 0
    (row,) = rows_of(tmp_path)
    results = json.loads((tmp_path / "runs/toy/partial_CE/seed0/results.json").read_text())["synthetic_val"]
    assert float(row["mIoU"]) == pytest.approx(results["sem_seg"]["mIoU"], abs=1e-4)
    assert float(row["rare"]) == pytest.approx(results["report"]["rare_region_mIoU"], abs=1e-4)
    assert float(row["loss"]) > 0 and row["iterations"] == "2"
    points = read_rows(str(tmp_path / "curves.csv"))["toy", "partial CE", 0]
    assert [p["iteration"] for p in points] == ["1", "2"] and points[1]["mIoU"] == row["mIoU"]
    assert "### toy" in summarize(study, str(tmp_path))
    for name in ("scores.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_data_are_made_and_mistakes_end_the_study(tmp_path, load, command):
    script = tmp_path / "make.py"
    script.write_text("import os, sys\nopen(sys.argv[1], 'w').write(os.environ['DETECTRON2_DATASETS'])\n")
    data = {"toy": {"root": "{output}/data", "prepare": [f"{script} {{output}}/made"]}}
    assert run_study(load(definition(data=data, seeds=[0])), str(tmp_path), command=command) == 0
    assert (tmp_path / "made").read_text() == f"{tmp_path}/data"
    data["toy"]["prepare"] = ["gone.py --flag"]
    with pytest.raises(BLPSegError, match="data set toy: `gone.py --flag` ended with status 2"):
        run_study(load(definition(data=data)), str(tmp_path), command=command)
    study = load(definition(metrics={"typo": "sem_seg/mIuO"}, seeds=[3]))
    assert run_study(study, str(tmp_path), command=command) == 1 and len(rows_of(tmp_path)) == 2


def test_table_by_hand(tmp_path, load):
    study = definition(upper_bound="BLP", seeds=[0, 1, 2], compare=[["LAM + x", "BLP"], ["LAM + x", "LAM + x"]])
    study["methods"]["LAM + x"] = {**OFF, "seeds": [0, 1]}
    study = load(study)
    with open(tmp_path / "runs.csv", "w") as file:
        file.write("data,method,seed,mIoU,rare,loss\n")
        for seed, (base, other) in enumerate([(40, 50), (42, 41), (44, 53)]):
            file.write(f"toy,partial CE,{seed},{base},10,3\ntoy,BLP,{seed},{other},,1\n")
        file.write("toy,LAM + x,0,55,,\ntoy,LAM + x,1,40,nan,\ntoy,gone,0,1,1,1\nother,BLP,0,1,1,1\n")
    lines = summarize(study, str(tmp_path)).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if "|" in line}
    assert cells["method"][-2:] == ["mIoU, share of BLP", "loss"] and "gone" not in cells
    assert cells["partial CE"][:3] == ["3", "42.0 ± 2.0", "10.0 ± 0.0"] and cells["partial CE"][-1] == "3.00 ± 0.00"
    # Of BLP: mean 48, deviations 2, -7, 5; differences 10, -1, 9: mean 6, deviations 4, -7, 3.
    assert cells["BLP"][1:3] == [f"48.0 ± {(78 / 2) ** 0.5:.1f}", ""]
    assert cells["BLP"][3:5] == [f"+6.0 ± {(74 / 2) ** 0.5:.1f} (2/3 higher)", ""]
    share = 100 * (40 / 50 + 42 / 41 + 44 / 53) / 3
    assert cells["partial CE"][-2] == f"{share:.0f} %" and cells["BLP"][-2] == "100 %"
    # 55 - 50 and 40 - 41: mean 2, deviations 3 and -3.
    assert cells["(LAM + x) - BLP"] == [f"+2.0 ± {18**0.5:.1f} (1/2 higher)", ""]


def test_grid_and_options(tmp_path, load, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "somewhere")
    data = {0.5: {}, "other": {"methods": ["partial CE"], "upper_bound_of": 0.5, "root": "{data}/x"}}
    methods = {**definition()["methods"], "more": {"SOLVER.MAX_ITER": 9, "seeds": [1]}}
    study = load(definition(data=data, methods=methods), "SOLVER.MAX_ITER", "7")
    assert [run.key for run in study.runs] == [
        ("0.5", "partial CE", 0), ("0.5", "BLP", 0), ("other", "partial CE", 0),
        ("0.5", "partial CE", 1), ("0.5", "BLP", 1), ("0.5", "more", 1), ("other", "partial CE", 1),
    ]  # fmt: skip
    # The command line is above the study's options, not above what a method is about.
    assert [run.options[1] for run in study.runs] == ["7"] * 5 + ["9", "7"]
    assert {run.root for run in study.runs} == {"", "somewhere/x"} and study.bounds["other"] == "0.5"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"method": {}}, "unknown key 'method'; known are config, "),
        ({"seeds": []}, "seeds missing"),
        ({"seeds": [1.5]}, "seeds must be a list of whole numbers"),
        ({"reference": "nobody"}, "'nobody' is not in the study"),
        ({"data": {"toy": {"methods": ["BPL"]}}}, "methods: 'BPL' is not in the study"),
        ({"options": {"SOLVER.MAX_ITERS": 3}}, "MAX_ITERS"),
        ({"config": None}, "config must be the path of a config file"),
        ({"config": "configs/none.yaml"}, "configs/none.yaml"),
        ({"methods": {"a b": {}, "a_b": {}}}, "would share a folder"),
        ({"metrics": ["train/loss_seg"]}, "metrics: expected names with values, found list"),
        ({"compare": ["BLP"]}, "compare: expected a list"),
        ({"compare": [["BLP", "LMA"]]}, "compare: 'LMA' is not in the study"),
        ({"compare": [["BLP"]]}, "compare: expected a list of 2 names"),
    ],
)
def test_mistakes_are_one_line(load, change, words):
    with pytest.raises(BLPSegError) as caught:
        check_configs(load(definition(**change)))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_study(tmp_path, load):
    for text in ("a: [", "[]", "just words"):
        with pytest.raises(BLPSegError):
            load(text)
    with pytest.raises(BLPSegError, match="none.yaml"):
        load_study(str(tmp_path / "none.yaml"), "")
    with pytest.raises(BLPSegError, match="SOLVER.MAX_ITER has no value"):
        load(definition(), "SOLVER.MAX_ITER")
    study = load(definition())
    with pytest.raises(BLPSegError, match="run it first"):
        summarize(study, str(tmp_path))
    for content, words in (
        (b"data;method;seed\ntoy;BLP;0\n", "not a study's CSV"),
        (b"data,method,seed,mIoU\n\xff\xfe,BLP,0,50\n", "not a study's CSV"),
        (b"data,method,seed,mIoU\ntoy,BLP,0,5O\n", "mIoU is '5O' in one of the rows"),
    ):
        (tmp_path / "runs.csv").write_bytes(content)
        with pytest.raises(BLPSegError, match=words):
            summarize(study, str(tmp_path))


@pytest.mark.parametrize("path", sorted((ROOT / "research/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_published_studies(tmp_path, root, monkeypatch, path):
    """Their files load with today's configs, and their tables are those of their rows."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_: None)  # drawing takes most of the time
    study = load_study(str(path), "output")
    check_configs(study)
    published = path.with_suffix("")
    for name in ("runs.csv", "curves.csv"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    assert read_rows(str(tmp_path / "runs.csv")).keys() == {run.key for run in study.runs}
    assert summarize(study, str(tmp_path)) == (published / "table.md").read_text()
