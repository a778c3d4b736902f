"""Fixtures for every room: the reference data beside the project, tiny configs and data."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

from blpseg.utils.imports import defer_compiler

defer_compiler()  # as the command lines do

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from blpseg import get_cfg  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CLASSES = ["background", "apple", "pear"]

# Two threads are what the smallest supported machine has; more would change the order of sums between machines.
torch.set_num_threads(min(2, os.cpu_count() or 1))

# One server forks the processes that tests start (tests/engine/door.py, tests/docs/snippets.py). It has imported what a
# training loads, which saves each of them these seconds.
LOADED = ["blpseg.engine.trainer", "blpseg.engine.processes", "tests.engine.door", "timm", "torch._dynamo"]
multiprocessing.get_context("forkserver").set_forkserver_preload([*LOADED, "torch.utils.tensorboard"])

# A run in the background of a script has SIGINT ignored, one under `nohup` SIGHUP; what the tests start inherits that.
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, handler)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """The published implementation's numbers; skips where they do not stand beside the project."""
    return _shared("golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images with real and dense labels; skips where they do not stand beside the project."""
    return _shared("data")


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"../shared/{name} does not stand beside the project")
    return SHARED / name


PARITY: list[tuple] = []


@pytest.fixture
def parity(record_property):
    """``parity(quantity, kind, error, tolerance)`` adds a row to the table printed after the tests."""
    # A test's properties travel with its report, also from another process to the one that prints.
    return lambda *row: record_property("parity", row)


def pytest_runtest_logreport(report):
    if report.when == "call":
        PARITY.extend(row for name, row in report.user_properties if name == "parity")


def pytest_terminal_summary(terminalreporter):
    if PARITY:
        terminalreporter.section("parity with the published implementation, and with the method's formulas (narrow)")
        for quantity, kind, error, tolerance in PARITY:
            verdict = "match" if error <= tolerance else "DIFFERS"
            terminalreporter.write_line(f"{quantity:45} {kind:13} {error:9.1e}  (<= {tolerance:g})  {verdict}")


@pytest.fixture
def tiny_cfg():
    """A ResNet-18 model of 5 classes with narrow parts, on the CPU."""
    return get_cfg(
        str(ROOT / "configs/Base-BLPSeg-R18.yaml"),
        ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 16, "MODEL.BLPSEG.HEAD_CHANNELS", 16],
    )


@pytest.fixture
def made_folder(tmp_path):
    """Six training and three validation images of three classes: smooth colours, strokes of three rows, full masks."""
    rng = np.random.default_rng(0)
    root = tmp_path / "made"
    for split, count in (("train", 6), ("val", 3)):
        for part in ("images", "masks", "scribbles"):
            (root / part / split).mkdir(parents=True)
        for i in range(count):
            height, width = 40 + 2 * i, 52 - i
            image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 2)
            mask = np.zeros((height, width), np.uint8)
            mask[8:20, 6:30], mask[24:36, 10:40] = 1, 2
            scribble = np.full((height, width), 255, np.uint8)
            scribble[2, 3:40], scribble[12:15, 8:24], scribble[28:31, 14:35] = 0, 1, 2
            name = f"{split}{i}"
            cv2.imwrite(str(root / f"images/{split}/{name}.jpg"), image)
            cv2.imwrite(str(root / f"masks/{split}/{name}.png"), mask)
            if split == "train":
                cv2.imwrite(str(root / f"scribbles/{split}/{name}.png"), scribble)
    return root


@pytest.fixture
def made_cfg(made_folder):
    """Config keys -> a config of the made folder, registered as ``made``."""

    def build(*opts):
        return get_cfg(
            str(ROOT / "configs/Base-BLPSeg-R101.yaml"),
            [
                *("DATASETS.FOLDER.NAME", "made", "DATASETS.FOLDER.ROOT", str(made_folder)),
                *("DATASETS.FOLDER.CLASSES", CLASSES, "DATASETS.FOLDER.TRAIN_MASKS", "masks/train"),
                *("DATASETS.TRAIN", ("made_train",), "DATASETS.TEST", ("made_val",)),
                *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", len(CLASSES), "INPUT.CROP.SIZE", [32, 36]),
                *("SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0, "SEED", 5),
                *opts,
            ],
        )

    return build


@contextlib.contextmanager
def time_limit(seconds: float = 10, waiting: float = 300):
    """TimeoutError after so many seconds of this process's CPU, which do not depend on other work on the machine, or
    after ``waiting`` seconds of sleep as well."""

    def late(*_):
        raise TimeoutError(f"took more than {seconds} s of CPU, or {waiting} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, waiting)}
    before = {signum: signal.signal(signum, late) for signum in timers}
    for which, after in timers.values():
        signal.setitimer(which, after)
    try:
        yield
    finally:
        for signum, (which, _) in timers.items():
            signal.setitimer(which, 0)
            signal.signal(signum, before[signum])


@pytest.fixture
def run_tool(root, monkeypatch):
    """Run a command line in this process (an import of PyTorch costs seconds): path, arguments -> status."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(root / name), run_name="__main__")
        return left.value.code or 0

    return run
