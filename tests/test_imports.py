"""What an import loads and what it registers, each in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for kind in ("tools", "datasets") for path in (ROOT / kind).glob("*.py"))
MODELS = "from detectron2.modeling import META_ARCH_REGISTRY, build_model; assert 'BLPSeg' in META_ARCH_REGISTRY"
DATA = "from detectron2.data import DatasetCatalog; assert 'camvid_val' in DatasetCatalog"
# Prints at exit which of the slow packages were loaded.
SHOW = """
import atexit, runpy, sys
slow = {"torch", "detectron2", "matplotlib", "scipy", "h5py"}
atexit.register(lambda: print("loaded:", *sorted(slow & sys.modules.keys())))
"""
RUN_SCRIPT = f"{SHOW}\nsys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')"


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [
        f"import blpseg; {MODELS}; {DATA}",
        f"import detectron2.modeling, detectron2.data, blpseg; {MODELS}; {DATA}",
        f"import blpseg.data.datasets; {DATA}; {MODELS}",
        f"import blpseg.modeling.local_aggregation; {MODELS}; {DATA}",
        "import detectron2.data, blpseg; assert blpseg.Predictor and blpseg.add_blpseg_config and blpseg.get_cfg()",
    ],
)
def test_registers_whatever_is_imported_first(code):
    run(code)


@pytest.mark.parametrize(
    "rooms", ["blpseg", "blpseg.scribbles, blpseg.utils.files, blpseg.utils.parallel", "blpseg.data.datasets"]
)
def test_import_loads_no_network(rooms):
    assert run(f"{SHOW}\nimport {rooms}") == "loaded:\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_no_network(script):
    output = run(RUN_SCRIPT, script, "--help")
    assert output.startswith("usage: ") and output.endswith("loaded:\n"), output[-200:]


def test_converting_a_stroke_file_loads_no_network(tmp_path):
    (tmp_path / "a.xml").write_text(
        "<annotation><size><width>9</width><height>7</height></size><polygon><tag>cat</tag>"
        "<point><X>1</X><Y>2</Y></point><point><X>5</X><Y>2</Y></point></polygon></annotation>"
    )
    arguments = ["--xml", str(tmp_path), "--output", str(tmp_path / "out"), "--vocabulary", "voc", "--workers", "1"]
    assert run(RUN_SCRIPT, "datasets/prepare_scribbles.py", *arguments).endswith("loaded:\n")
    assert (tmp_path / "out/a.png").is_file()
