"""What an import loads and what it registers, each in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for kind in ("tools", "datasets") for path in (ROOT / kind).glob("*.py"))
MODELS = "from detectron2.modeling import META_ARCH_REGISTRY, build_model; assert 'BLPSeg' in META_ARCH_REGISTRY"
DATA = "from detectron2.data import DatasetCatalog; assert 'camvid_val' in DatasetCatalog"
ORDERS = [
    f"import blpseg; {MODELS}; {DATA}",
    f"import detectron2.modeling, detectron2.data, blpseg; {MODELS}; {DATA}",
    f"import blpseg.data.datasets; {DATA}; {MODELS}",
    f"import blpseg.modeling.local_aggregation; {MODELS}; {DATA}",
    "import detectron2.data, blpseg; assert blpseg.Predictor and blpseg.add_blpseg_config and blpseg.get_cfg()",
]
# Prints at exit which of the slow packages were loaded; sympy is what torch._dynamo loads.
SHOW = """
import atexit, runpy, sys
slow = {"torch", "detectron2", "matplotlib", "scipy", "h5py", "timm", "sympy", "pandas"}
atexit.register(lambda: print("loaded:", *sorted(slow & sys.modules.keys())))
"""
RUN_SCRIPT = f"{SHOW}\nsys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')"
# Each argument is Python source for a process forked from one that has the packages below; prints what failed.
FORKS = """
import os, sys, traceback
exec(sys.argv[1])
for code in sys.argv[2:]:
    if not os.fork():
        try:
            exec(code, {"__name__": "fork"})
        except BaseException:
            print(code, traceback.format_exc(), flush=True)
        os._exit(0)
    os.wait()
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_registers_whatever_is_imported_first():
    assert run(FORKS, "import torchvision", *ORDERS) == ""
    assert "AssertionError" in run(FORKS, "", "assert False"), "a fork that fails is seen"


def test_imports_and_help_load_no_network():
    codes = [
        f"{SHOW}\nimport {rooms}\nassert not slow & sys.modules.keys()"
        for rooms in ("blpseg", "blpseg.scribbles, blpseg.utils.files, blpseg.utils.parallel", "blpseg.data.datasets")
    ]
    for script in SCRIPTS:
        codes.append(f"""{SHOW}
import contextlib, io
sys.argv = [{script!r}, "--help"]
with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
assert text.getvalue().startswith("usage: "), text.getvalue()
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
""")
    assert len(codes) > 20
    assert run(FORKS, "import cv2", *codes) == ""


def test_converting_a_stroke_file_loads_no_network(tmp_path):
    (tmp_path / "a.xml").write_text(
        "<annotation><size><width>9</width><height>7</height></size><polygon><tag>cat</tag>"
        "<point><X>1</X><Y>2</Y></point><point><X>5</X><Y>2</Y></point></polygon></annotation>"
    )
    arguments = ["--xml", str(tmp_path), "--output", str(tmp_path / "out"), "--vocabulary", "voc", "--workers", "1"]
    assert run(RUN_SCRIPT, "datasets/prepare_scribbles.py", *arguments).endswith("loaded:\n")
    assert (tmp_path / "out/a.png").is_file()


STEP = """
from blpseg.utils.imports import defer_compiler
defer_compiler()
import sys, torch
def step():
    optimizer.zero_grad()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
step()
assert "sympy" not in sys.modules
"""
COMPILED = """
from __main__ import layer, step
import sys, torch
compiled = torch.compile(layer, backend="eager")
assert torch.equal(compiled(torch.ones(1, 2)), layer(torch.ones(1, 2)))
step()
import torch._dynamo.utils as utils
assert torch._dynamo.utils is utils is sys.modules["torch._dynamo.utils"] and utils.is_compile_supported("cpu")
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.config.recompile_limit
"""
SUBMODULE = "from torch._dynamo.backends.registry import lookup_backend; lookup_backend('eager')\n"


def test_the_compiler_is_loaded_when_something_is_compiled():
    """By an attribute of its package, and by one of its modules."""
    assert run(FORKS, STEP, COMPILED, SUBMODULE + COMPILED) == ""
