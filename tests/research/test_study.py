"""The study runner through its command line: a grid that is killed and goes on; the table against figures by hand."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from blpseg.data.scenes import make_synthetic
from blpseg.utils.errors import BLPSegError
from research.study import load_study, run_study, summarize
from research.study.runner import row_key
from research.study.summary import mean_and_spread, paired

from ..conftest import ROOT

METRICS = {"mIoU": "sem_seg/mIoU", "rare": "report/rare_region_mIoU"}
OFF = {f"MODEL.BLPSEG.{part}.ENABLED": False for part in ("BLP", "LAM", "SELF_TRAINING")}


def definition(**changes) -> dict:
    return {
        "seeds": [0, 1],
        "metrics": METRICS,
        "also": {"loss": "train/loss_seg"},
        "reference": "partial CE",
        "options": {"SOLVER.MAX_ITER": 4},
        "data": {"toy": {"config": "configs/Synthetic-Scribble/blpseg_tiny.yaml"}},
        "methods": {"partial CE": OFF, "BLP": {**OFF, "MODEL.BLPSEG.BLP.ENABLED": True}},
        **changes,
    }


@pytest.fixture
def write(tmp_path, root, monkeypatch):
    """Writes a study file; configs are relative to the project, as for a user."""
    monkeypatch.chdir(root)

    def write(content) -> str:
        path = tmp_path / "study.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return write


def rows_of(folder) -> list[dict]:
    path = folder / "runs.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_killed_and_resumed(tmp_path, root, write, capfd):
    data = tmp_path / "data"
    make_synthetic(str(data / "synthetic"), size=(48, 48), train=6, val=2, seed=0)
    options = {
        "SOLVER.MAX_ITER": 6, "SOLVER.IMS_PER_BATCH": 2, "SOLVER.CHECKPOINT_PERIOD": 2, "TEST.EVAL_PERIOD": 3,
        "INPUT.CROP.SIZE": [32, 32], "OUTPUT.PANEL_PERIOD": 0, "OUTPUT.LOG_PERIOD": 1, "TEST.REPORT.PANELS": 0,
    }  # fmt: skip
    study = definition(options=options)
    study["data"]["toy"]["root"] = str(data)
    output = tmp_path / "out"
    command = [sys.executable, "tools/run_study.py", write(study), "--output", str(output), "--threads", "1"]

    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Killed in the middle of the second run: the first one's row is there, the second has a checkpoint.
    second = output / "runs/toy/BLP/seed0"
    deadline = time.monotonic() + 240
    while not (rows_of(output) and list(second.glob("model_*.pth"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = rows_of(output)
    assert 1 <= len(first) < 4 and first[0]["method"] == "partial CE"

    # Asked to end in the middle of another: it ends that one's process too, and says how to go on.
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    third = output / "runs/toy/partial_CE/seed1"
    while not list(third.glob("model_*.pth")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 143 and "2 of 4 runs done; the same command goes on" in said
    assert not (third / "final").exists()

    again = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    rows = rows_of(output)
    assert [(r["method"], r["seed"]) for r in rows] == [(m, s) for s in "01" for m in ("partial CE", "BLP")]
    assert rows[0] == first[0], "a finished run was repeated"
    assert all("continuing after iteration" in (run / "console.txt").read_text() for run in (second, third))
    assert all(r["git_revision"] and r["finished"] and float(r["seconds"]) > 0 for r in rows)
    assert all(0 <= float(r[m]) <= 100 for r in rows for m in ("mIoU", "rare")) and all(r["loss"] for r in rows)
    assert {r["iterations"] for r in rows} == {"6"}
    # A row has what is needed to run it by itself, and its numbers are the run's.
    assert "SOLVER.MAX_ITER 6" in rows[0]["options"] and "SEED 0" in rows[0]["options"]
    assert rows[0]["root"] == str(data) and json.loads(rows[0]["metrics"])["mIoU"] == "sem_seg/mIoU"
    results = json.loads((output / "runs/toy/BLP/seed1/final/results.json").read_text())["synthetic_val"]
    assert float(rows[3]["mIoU"]) == pytest.approx(results["sem_seg"]["mIoU"], abs=1e-4)
    assert float(rows[3]["rare"]) == pytest.approx(results["report"]["rare_region_mIoU"], abs=1e-4)
    with open(output / "curves.csv", newline="") as file:
        assert [r["iteration"] for r in csv.DictReader(file)] == ["3", "6"] * 4
    assert "### toy" in again.stdout and (output / "table.md").read_text() in again.stdout
    for name in ("scores.png", "curves.png"):
        assert (output / name).stat().st_size > 1000

    # Another config: the runs it touches are repeated from the start, the others are not.
    study["methods"]["BLP"]["MODEL.BLPSEG.BLP.GAMMA"] = 1.0
    study["seeds"] = [0]
    # A mistake in the data ends its run in a line, not the study.
    study["data"]["gone"] = {**study["data"]["toy"], "root": str(tmp_path / "nowhere")}
    assert run_study(load_study(write(study), str(output)), str(output), jobs=2, threads=1) == 1
    said = capfd.readouterr()
    assert "FAILED gone | BLP | 0: error: " in said.out and "Traceback" not in said.out + said.err
    rows = rows_of(output)
    assert [(r["method"], r["seed"]) for r in rows[:2]] == [("partial CE", "0"), ("BLP", "0")]
    assert rows[0] == first[0] and "GAMMA 1.0" in rows[1]["options"]
    # What the study no longer names stays, but does not count.
    assert [(r["method"], r["seed"]) for r in rows[2:]] == [("partial CE", "1"), ("BLP", "1")]
    table = summarize(load_study(write(study), str(output)), str(output))
    assert f"| BLP        | 1       | {float(rows[1]['mIoU']):.1f} " in table
    # Nor does a row of another config.
    study["methods"]["BLP"]["MODEL.BLPSEG.BLP.GAMMA"] = 3.0
    assert "| BLP " not in summarize(load_study(write(study), str(output)), str(output))

    # A metric that no evaluation gives is told with those there are, and costs no row.
    del study["data"]["gone"], study["methods"]["BLP"]
    study["metrics"] = {**METRICS, "typo": "sem_seg/mIuO"}
    assert run_study(load_study(write(study), str(output)), str(output)) == 1
    said = capfd.readouterr().out
    assert "FAILED toy | partial CE | 0: no sem_seg/mIuO among the scores" in said and "sem_seg/mIoU, " in said
    study["metrics"] = {**METRICS, "accuracy": "sem_seg/pACC"}
    study["seeds"] = [0, 1]
    assert len(rows_of(output)) == 4
    folder = output / "runs/toy/partial_CE/seed1"
    folder.rename(tmp_path / "away")
    folder.write_text("in the way")
    assert run_study(load_study(write(study), str(output)), str(output)) == 1
    assert "failed: toy | partial CE | 1: " in capfd.readouterr().err
    assert [bool(row["accuracy"]) for row in rows_of(output)] == [True, False, False, False]
    # What failed is measured again, though its row is there, and has the column.
    folder.unlink()
    (tmp_path / "away").rename(folder)
    assert run_study(load_study(write(study), str(output)), str(output)) == 0
    assert [bool(row["accuracy"]) for row in rows_of(output)] == [True, True, False, False]
    # So is a column that has come to mean something else; its old scores are no scores of the new.
    study["metrics"]["accuracy"], study["seeds"] = "sem_seg/mACC", [0]
    before = rows_of(output)
    assert "| accuracy" in summarize(load_study(write(study), str(output)), str(output))
    assert f"{float(before[0]['accuracy']):.1f}" not in summarize(load_study(write(study), str(output)), str(output))
    assert run_study(load_study(write(study), str(output)), str(output)) == 0
    results = json.loads((output / "runs/toy/partial_CE/seed0/final/results.json").read_text())["synthetic_val"]
    assert float(rows_of(output)[0]["accuracy"]) == pytest.approx(results["sem_seg"]["mACC"], abs=1e-4)
    assert rows_of(output)[0]["accuracy"] != before[0]["accuracy"]
    # A column that stays without a value is told, and measured once the study file is corrected.
    study["seeds"], study["also"] = [0], {"new": "train/loss_sge"}
    assert run_study(load_study(write(study), str(output)), str(output)) == 1
    said = capfd.readouterr()
    assert "error: no run has a value of new (train/loss_sge)" in said.err
    assert "no new (train/loss_sge) in toy | partial CE | 0\n" in said.out
    study["also"] = {"new": "train/loss_seg"}
    assert run_study(load_study(write(study), str(output)), str(output)) == 0
    assert float(rows_of(output)[0]["new"]) > 0


def test_table_by_hand(tmp_path, root, write):
    study = load_study(write(definition(upper_bound="BLP", seeds=[0, 1, 2], also=None)), str(tmp_path))
    with open(tmp_path / "runs.csv", "w") as file:
        file.write("data,method,seed,mIoU,rare\n")
        for seed, (base, other) in enumerate([(40, 50), (42, 41), (44, 53)]):
            file.write(f"toy,partial CE,{seed},{base},10\ntoy,BLP,{seed},{other},\n")
    lines = summarize(study, str(tmp_path)).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if "|" in line}
    assert cells["partial CE"][:3] == ["3", "42.0 ± 2.0", "10.0 ± 0.0"]
    # Of BLP: mean 48, deviations 2, -7, 5; differences 10, -1, 9: mean 6, deviations 4, -7, 3.
    assert cells["BLP"][1] == f"48.0 ± {(78 / 2) ** 0.5:.1f}"
    assert cells["BLP"][3] == f"+6.0 ± {(74 / 2) ** 0.5:.1f} (2/3 higher)"
    share = 100 * (40 / 50 + 42 / 41 + 44 / 53) / 3
    assert cells["partial CE"][-1] == f"{share:.0f} %" and cells["BLP"][-1] == "100 %"


def test_differences_by_hand(tmp_path, root, write):
    methods = {**definition()["methods"], "LAM + x": OFF}
    compare = [["LAM + x", "BLP"], ["BLP", "partial CE"]]
    study = load_study(write(definition(methods=methods, compare=compare, also=None)), str(tmp_path))
    with open(tmp_path / "runs.csv", "w") as file:
        file.write("data,method,seed,mIoU,rare\n")
        file.write("toy,BLP,0,40,\ntoy,BLP,1,42,30\ntoy,LAM + x,0,45,20\ntoy,LAM + x,1,41,33\n")
    # mIoU: 5 and -1: mean 2, deviations 3 and -3. Nothing to compare BLP with: no line of it.
    assert summarize(study, str(tmp_path)).splitlines()[-3:] == [
        "| difference      | mIoU                    | rare              |",
        "|-----------------|-------------------------|-------------------|",
        f"| (LAM + x) - BLP | +2.0 ± {18**0.5:.1f} (1/2 higher) | +3.0 (1/1 higher) |",
    ]


def test_options_of_the_command_line(tmp_path, write):
    path = write(definition(options={"SOLVER.MAX_ITER": 4}))
    plain = load_study(path, str(tmp_path))
    above = load_study(path, str(tmp_path), ["SOLVER.MAX_ITER", "7", "MODEL.BLPSEG.LAM.ENABLED", "True"])
    assert {run.cfg().SOLVER.MAX_ITER for run in above.runs} == {7}
    assert not any(run.cfg().MODEL.BLPSEG.LAM.ENABLED for run in above.runs)  # what a method sets stays
    assert not {run.digest for run in plain.runs} & {run.digest for run in above.runs}
    with pytest.raises(BLPSegError, match="SOLVER.MAX_ITER has no value"):
        load_study(path, str(tmp_path), ["SOLVER.MAX_ITER"])
    with pytest.raises(BLPSegError, match="unknown config key"):
        load_study(path, str(tmp_path), ["SOLVER.MAX_ITERS", "7"])


def test_values_that_are_nearly_alike_are_runs_of_their_own(tmp_path, write):
    values = [1.0000001, 1.0000002]
    sweeps = {"gamma": {"of": "BLP", "key": "MODEL.BLPSEG.BLP.GAMMA", "values": values}}
    study = load_study(write(definition(sweeps=sweeps)), str(tmp_path))
    assert {run.cfg().MODEL.BLPSEG.BLP.GAMMA for run in study.runs if run.method != "partial CE"} == {2.0, *values}


def test_parts_of_the_grid(tmp_path, root, write):
    toy = definition()["data"]["toy"]
    data = {"toy": toy, "other": {**toy, "methods": ["partial CE"], "upper_bound_of": "toy"}}
    sweeps = {"gamma": {"of": "BLP", "key": "MODEL.BLPSEG.BLP.GAMMA", "values": [4], "data": ["toy"], "seeds": [1]}}
    study = load_study(write(definition(data=data, sweeps=sweeps, upper_bound="BLP")), str(tmp_path))
    assert [run.key for run in study.runs] == [
        ("toy", "partial CE", 0), ("toy", "BLP", 0), ("other", "partial CE", 0),
        ("toy", "partial CE", 1), ("toy", "BLP", 1), ("other", "partial CE", 1), ("toy", "BLP, gamma 4", 1),
    ]  # fmt: skip
    (tmp_path / "runs.csv").write_text("data,method,seed,mIoU,rare\ntoy,BLP,0,50,\nother,partial CE,0,20,\n")
    assert "| 40 %" in summarize(study, str(tmp_path)).split("### other")[1]


def test_pairs_are_of_the_same_seed():
    assert paired({0: 5.0, 2: 7.0}, {0: 1.0, 1: 9.0}) == [4.0]
    assert mean_and_spread([3.0])[0] == 3.0 and mean_and_spread([3.0])[1] != mean_and_spread([3.0])[1]


def test_sweep_has_the_methods_own_value(tmp_path, write):
    study = definition()
    study["sweeps"] = {"gamma": {"of": "BLP", "key": "MODEL.BLPSEG.BLP.GAMMA", "values": [0, 4]}}
    plan = load_study(write(study), str(tmp_path))
    assert plan.sweeps[0].points == ((0.0, "BLP, gamma 0"), (2.0, "BLP"), (4.0, "BLP, gamma 4"))
    assert len(plan.runs) == 8
    gammas = {run.method: run.cfg().MODEL.BLPSEG.BLP.GAMMA for run in plan.runs if run.method != "partial CE"}
    assert gammas == {"BLP, gamma 0": 0.0, "BLP": 2.0, "BLP, gamma 4": 4.0}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"method": {}}, "unknown key 'method'; did you mean methods?"),
        ({"seeds": []}, "seeds must be"),
        ({"reference": "nobody"}, "reference: 'nobody' is not in the study"),
        ({"data": {"toy": {"config": "x.yaml", "methods": ["BPL"]}}}, "methods: 'BPL' is not in the study"),
        ({"options": {"SOLVER.MAX_ITERS": 3}}, "unknown config key"),
        ({"data": {"toy": {}}}, "no config"),
        ({"data": {"toy": {"config": "configs/none.yaml"}}}, "no such config file"),
        ({"methods": {"a b": {}, "a_b": {}}, "reference": "a b"}, "would share the folder"),
        ({"seeds": [1, 1]}, "one is there twice"),
        ({"sweeps": {"g": {"of": "BLP", "key": "MODEL.DEVICE", "values": [1]}}}, "needs a key that is a number"),
        ({"sweeps": {"g": {"of": "BLP", "key": "SOLVER.MAX_ITER", "values": [1.5]}}}, "takes whole numbers, not 1.5"),
        ({"sweeps": {"g": {"of": "BLP", "key": "MODEL.NOPE", "values": [1]}}}, "unknown config key MODEL.NOPE"),
        ({"sweeps": ["gamma"]}, "sweeps must map names"),
        ({"sweeps": {"g": {"of": "BLP", "key": "SOLVER.MAX_ITER", "values": [9], "data": []}}}, "data is empty"),
        ({"sweeps": {"g": {"of": "BLP", "key": "SOLVER.MAX_ITER", "values": [float("nan")]}}}, "a list of numbers"),
        ({"also": ["train/loss_seg"]}, "also must map names"),
        ({"also": {"mIoU": "train/loss_seg"}}, "the column mIoU is there already"),
        ({"also": {"seed": "train/loss_seg"}}, "the column seed is there already"),
        ({"data": {"toy": {"config": 5}}}, "config must be the path of a file, not 5"),
        ({"methods": {"..": {}}, "reference": None}, "'..' gives no name of a folder"),
        ({"compare": ["BLP"]}, "compare must be a list of pairs"),
        ({"compare": [["BLP", "LMA"]]}, "compare: 'LMA' is not in the study"),
    ],
)
def test_mistakes_are_one_line(tmp_path, write, change, words):
    with pytest.raises(BLPSegError) as caught:
        load_study(write(definition(**change)), str(tmp_path))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_study(tmp_path, write):
    for text in ("a: [", "[]", "just words"):
        with pytest.raises(BLPSegError):
            load_study(write(text), str(tmp_path))
    with pytest.raises(BLPSegError, match="not a readable study file"):
        load_study(os.path.join(tmp_path, "none.yaml"), str(tmp_path))
    study = load_study(write(definition()), str(tmp_path))
    with pytest.raises(BLPSegError, match="run it first"):
        summarize(study, str(tmp_path))
    (tmp_path / "runs.csv").write_text("data;method;seed\ntoy;BLP;0\n")
    with pytest.raises(BLPSegError, match="not a study's CSV"):
        summarize(study, str(tmp_path))
    (tmp_path / "runs.csv").write_bytes(b"data,method,seed,mIoU\n\xff\xfe,BLP,0,50\n")
    with pytest.raises(BLPSegError, match="not a CSV file"):
        summarize(study, str(tmp_path))


def test_names_that_yaml_reads_as_numbers(tmp_path, write):
    toy = definition()["data"]["toy"]
    data = {0.5: {**toy, "root": None}, 1: {**toy, "methods": ["BLP"], "upper_bound_of": 0.5}}
    sweeps = {"gamma": {"of": "BLP", "key": "MODEL.BLPSEG.BLP.GAMMA", "values": [4], "data": [1]}}
    study = load_study(write(definition(data=data, sweeps=sweeps, upper_bound=None)), str(tmp_path))
    assert {run.key[:2] for run in study.runs} == {
        ("0.5", "partial CE"), ("0.5", "BLP"), ("1", "BLP"), ("1", "BLP, gamma 4"),
    }  # fmt: skip
    assert study.data["1"].upper_bound_of == "0.5" and study.data["0.5"].root == "" and study.upper_bound == ""


def test_digest_is_of_what_decides_the_result(tmp_path, write, monkeypatch):
    def digest(folder="a", **changes):
        return load_study(write(definition(**changes)), str(tmp_path / folder)).runs[0].digest

    first = digest()
    toy = definition()["data"]["toy"]
    prepared = {"toy": {**toy, "prepare": [["make.py", "{output}/x", "{data}"]]}}
    assert digest("b") == first and digest(options={"SOLVER.MAX_ITER": 5}) != first
    before = digest(data=prepared)
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    assert digest("b", data=prepared) == before != first
    assert digest(also=None) == first and digest(seeds=[2]) != first
    # Data that no command makes are told apart by where they lie.
    assert len({first, digest(data={"toy": {**toy, "root": "x"}}), digest(data={"toy": {**toy, "root": "y"}})}) == 3


PUBLISHED = sorted(path.stem for path in (ROOT / "research/studies").glob("*.yaml"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_studies_load(root, monkeypatch, name):
    monkeypatch.chdir(root)
    study = load_study(f"research/studies/{name}.yaml", "output")
    assert len(study.seeds) >= 3 and {study.reference, study.upper_bound} <= study.methods.keys()
    ran = {(run.data, run.method) for run in study.runs}
    assert {method for _, method in ran} == study.methods.keys()
    for data in study.data.values():  # each has what it is compared with, and its share is of something
        assert (data.name, study.reference) in ran
        assert (data.upper_bound_of or data.name, study.upper_bound) in ran


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_are_those_of_the_published_runs(tmp_path, root, monkeypatch, name):
    monkeypatch.chdir(root)
    published = ROOT / "research/studies" / name
    for file in ("runs.csv", "curves.csv"):
        shutil.copy(published / file, tmp_path)
    study = load_study(f"research/studies/{name}.yaml", str(tmp_path))
    found = {row_key(row, name): row["digest"] for row in rows_of(tmp_path)}
    assert found == {run.key: run.digest for run in study.runs}  # the whole grid, and of these very configs
    table = summarize(study, str(tmp_path))
    assert table == (published / "table.md").read_text()
    results = (ROOT / "docs/RESULTS.md").read_text()
    assert all(part in results for part in table.strip().split("\n\n") if part.startswith("|"))
