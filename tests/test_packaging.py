"""The wheel and the sdist hold what they should, and an installed wheel works without the clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

import blpseg

pytestmark = pytest.mark.slow


def call(*command, **options):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """(wheel, sdist), built from a copy of the clone."""
    folder = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns(".*", "output", "build", "dist", "site", "*.egg-info", "__pycache__", "synthetic")
    copy = shutil.copytree(root, folder / "clone", ignore=ignore)
    backend = "import setuptools.build_meta as b; print(b.build_wheel('..')); print(b.build_sdist('..'))"
    call(sys.executable, "-W", "ignore", "-c", backend, cwd=copy)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """``installed(script, *arguments)`` runs a script of an environment that has the wheel, but no clone."""
    folder = tmp_path_factory.mktemp("installed")
    python = folder / "env/bin/python"
    call(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", built[0])
    # The packages that the wheel needs are those of this environment; the .pth files there, an editable BLPSeg's
    # among them, do not count in the new one.
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(script, *arguments):
        return call(folder / "env/bin" / script, *arguments, cwd=folder, env=environment)

    return run


def test_contents(built):
    wheel, sdist = built
    assert wheel.name.startswith(f"blpseg-{blpseg.__version__}-py3")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "blpseg/py.typed",
        "blpseg/annotate/static/index.html",
        "blpseg/tools/train_net.py",
        "blpseg/prepare/make_synthetic.py",
        "blpseg/configs/Base-BLPSeg-R18.yaml",
        "blpseg/configs/Synthetic-Scribble/blpseg_tiny.yaml",
    } <= inside
    assert {name.split("/")[0] for name in inside} == {"blpseg", f"blpseg-{blpseg.__version__}.dist-info"}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "Makefile", "docs/METHOD.md", "tests/conftest.py", "tools/demo.py"} <= inside


def test_console_scripts(installed):
    for script in ("blpseg-demo", "blpseg-train", "blpseg-make-synthetic"):
        assert "--debug" in installed(script, "--help"), script
    assert "--config-file" in installed("python", "-m", "blpseg.tools.check_dataset", "--help")


def test_configs_are_found_by_name(installed):
    read = "import blpseg as b; print(b.__file__, b.get_cfg('Synthetic-Scribble/blpseg_tiny.yaml').SOLVER.MAX_ITER)"
    file, iterations = installed("python", "-W", "ignore", "-c", read).split()
    assert "/env/lib/" in file and int(iterations) == 600


def test_data_training_and_pictures_without_the_clone(installed):
    installed("blpseg-make-synthetic", "--train", 4, "--val", 2, "--size", 48)
    config = ["--config-file", "Synthetic-Scribble/blpseg_tiny.yaml"]
    small = ["INPUT.CROP.SIZE", "[32, 32]", "SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", "out"]
    assert "mIoU: " in installed("blpseg-train", *config, *small, "SOLVER.MAX_ITER", 1)
    weights = ["--opts", "MODEL.WEIGHTS", "out/model_final.pth"]
    pictures = installed("blpseg-demo", *config, "--dataset", "synthetic_val", "--output", "pictures", *weights)
    assert "2 of 2 images" in pictures
