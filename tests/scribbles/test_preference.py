import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

from blpseg.scribbles import preference
from blpseg.utils.files import write_png_atomic
from datasets.make_synthetic import make_synthetic
from tools.label_preference import write_csv

ROOT = Path(__file__).resolve().parents[2]


def made_mask(seed, shape=(40, 50)):
    return (ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3) > 0).astype(np.uint8)


def test_counts():
    mask = np.zeros((9, 20), np.uint8)
    mask[:, 10:] = 1
    mask[0] = 255
    scribble = np.full(mask.shape, 255, np.uint8)
    scribble[1, :12] = 0  # on the outermost row; two pixels in the wrong class
    scribble[5, 13:17] = 1
    counts = preference.count_annotated([scribble, mask], mask, 3)
    assert counts.shape[:2] == (2, 3)
    assert counts[:, :, :, 0].sum(axis=2).tolist() == [[80, 80, 0]] * 2
    assert counts[:, :, :, 1].sum(axis=2).tolist() == [[10, 4, 0]] * 2
    assert counts[0, 0, 0, 1] == 10  # all at distance 1
    assert counts[0, 1, 3, 1] == 4  # 4 or 5 pixels from another value; the image's edge is no boundary
    assert counts[1, 1, :, 1].sum() == 4 and (counts[1, 1, :3, 1] == 0).all()
    _, relative = preference.shares(counts)
    assert np.allclose(relative[..., 1][counts[..., 0] > 0], 1)  # all annotated: no preference


def test_files(tmp_path):
    pairs = []
    for number in range(3):
        paths = str(tmp_path / f"{number}s.png"), str(tmp_path / f"{number}m.png")
        mask = made_mask(number)
        write_png_atomic(paths[1], mask)
        write_png_atomic(paths[0], np.where(np.random.default_rng(number).random(mask.shape) < 0.1, mask, 255))
        pairs.append(paths)
    counts = preference.measure(pairs, 2, preferences=(0, 1), workers=2)
    assert np.array_equal(counts, preference.measure(pairs[::-1], 2, preferences=(0, 1), workers=1))
    assert counts.shape[-1] == 4 and counts[0, :, :, 0].sum() == 3 * 40 * 50
    _, relative = preference.shares(counts)
    assert (relative[0, :, 0, 2] < 0.3).all()  # preference 1 leaves the boundary alone

    write_csv(str(tmp_path / "t.csv"), counts, ["a", "b"], ["on disk", "0", "1"])
    rows = list(csv.DictReader(open(tmp_path / "t.csv")))
    for row in rows:
        assert np.isclose(float(row["probability"]), int(row["annotated"]) / int(row["pixels"]), rtol=1e-5)
    on_disk = [r for r in rows if (r["scribbles"], r["quantity"]) == ("on disk", "distance")]
    assert sum(int(r["pixels"]) for r in on_disk) == 3 * 40 * 50


def test_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("DATASETS: {TRAIN: [synthetic_scribble_train]}\n")
    make_synthetic(str(tmp_path / "synthetic"), size=(64, 64), train=4, val=1, seed=0, workers=1)
    command = [sys.executable, "tools/label_preference.py", "--config-file", tmp_path / "c.yaml", "--simulate", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "simulated, preference 0" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["label_preference.csv", "label_preference.png"]
