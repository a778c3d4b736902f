"""The code in the documents runs as it stands there."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from blpseg.prepare.make_synthetic import make_synthetic

from . import snippets

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
EXTENDING = snippets.sections(ROOT / "docs/EXTENDING.md")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A data root with nine generated images."""
    root = tmp_path_factory.mktemp("data")
    make_synthetic(str(root / "synthetic"), size=(48, 48), train=6, val=3)
    return ENVIRONMENT | {"DETECTRON2_DATASETS": str(root)}


@pytest.fixture
def clone(tmp_path):
    """A working directory with a clone's configs in it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


@pytest.mark.parametrize("heading", EXTENDING)
def test_extending(heading, environment, clone):
    files = [block.title for block in EXTENDING[heading] if block.title]
    assert len(files) <= 2, "a change touches at most two files"
    printed = snippets.run(EXTENDING[heading], clone, environment)
    if any(block.language == "bash" for block in EXTENDING[heading]):
        assert "mIoU: " in printed


def test_a_block_that_fails_is_reported(tmp_path):
    block = snippets.Block("python", "", "print('seen')\nraise SystemExit(3)\n")
    with pytest.raises(AssertionError, match="raise SystemExit(.|\n)*seen"):
        snippets.run([block], tmp_path, {})


def test_blocks_and_commands():
    text = '## A\n```yaml title="b.yaml"\nX: 1\n```\n\n```bash\n# why\npython a.py --x \\\n    "y z"   # and\n```\n'
    assert snippets.blocks(text) == [
        snippets.Block("yaml", "b.yaml", "X: 1\n"),
        snippets.Block("bash", "", '# why\npython a.py --x \\\n    "y z"   # and\n'),
    ]
    assert snippets.commands(snippets.blocks(text)[1].text) == [["python", "a.py", "--x", "y z"]]


def draw_photos_and_strokes(folder):
    """Three photos of two colours on a third, labelme strokes on each, and the classes' numbers."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    (folder / "annotations").mkdir()
    (folder / "classes.yaml").write_text("background: 0\nleaf: 1\nstem: 2\n")
    for name in "abc":
        photo = rng.integers(0, 60, (96, 128, 3), np.uint8)
        photo[20:50, 20:90, 1] += 150
        photo[60:90, 50:70, 2] += 150
        cv2.imwrite(str(folder / f"photos/{name}.jpg"), photo)
        strokes = {"background": [(5, 5), (120, 8)], "leaf": [(25, 30), (85, 40)], "stem": [(60, 65), (60, 85)]}
        shapes = [{"label": c, "shape_type": "linestrip", "points": points} for c, points in strokes.items()]
        content = {"imagePath": f"{name}.jpg", "imageHeight": 96, "imageWidth": 128, "shapes": shapes}
        (folder / f"annotations/{name}.json").write_text(json.dumps(content))
