"""Fixtures for every room: the reference data beside the project, tiny configs and data."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Two threads are what the smallest supported machine has; more would change the order of sums between machines.
torch.set_num_threads(min(2, os.cpu_count() or 1))


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


PARITY = pytest.StashKey[list]()


@pytest.fixture
def parity(request):
    """``parity(quantity, kind, error, tolerance)`` adds a row to the table printed after the tests."""
    rows = request.config.stash.setdefault(PARITY, [])
    return lambda *row: rows.append(row)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(PARITY, [])
    if rows:
        terminalreporter.section("parity with the published implementation")
        for quantity, kind, error, tolerance in rows:
            verdict = "match" if error <= tolerance else "DIFFERS"
            terminalreporter.write_line(f"{quantity:45} {kind:13} {error:9.1e}  (<= {tolerance:g})  {verdict}")


@pytest.fixture
def tiny_cfg():
    """A ResNet-18 model of 5 classes with narrow parts, on the CPU."""
    from blpseg import get_cfg

    return get_cfg(
        str(ROOT / "configs/Base-BLPSeg-R18.yaml"),
        ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "MODEL.BLPSEG.DECODER.CHANNELS", 16, "MODEL.BLPSEG.HEAD_CHANNELS", 16],
    )
