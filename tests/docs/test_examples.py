"""The examples run: the notebook from photo and strokes to a mask, and inference without PyTorch."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from blpseg import get_cfg
from blpseg.evaluation.export import export

from . import snippets


@pytest.mark.slow
def test_notebook(root, tmp_path):
    cells = json.loads((root / "examples/photo_to_mask.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "ITERATIONS = 120" in code
    short = code.replace("ITERATIONS = 120", "ITERATIONS = 2")
    snippets.run([snippets.Block("python", "", short)], tmp_path, {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"})
    mask = cv2.imread(str(tmp_path / "mask.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (600, 512) and set(np.unique(mask)) <= {0, 1, 2}
    assert (tmp_path / "mask_figure.png").stat().st_size > 10_000


def test_onnx_example_without_torch(root, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    cfg = get_cfg(str(root / "configs/Synthetic-Scribble/blpseg_tiny.yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    export(model, str(tmp_path / "model.onnx"), class_names=list("abcdefg"), image_format=cfg.INPUT.FORMAT)
    photo = np.random.default_rng(0).integers(0, 256, (48, 72, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), photo[..., ::-1])
    without = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", without + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    arguments = [root / "examples/onnx_masks.py", tmp_path / "model.onnx", tmp_path / "masks", tmp_path / "photo.png"]
    result = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        logits = model([{"image": torch.from_numpy(photo.transpose(2, 0, 1).astype(np.float32))}])[0]["sem_seg"]
    mask = cv2.imread(str(tmp_path / "masks/photo.png"), cv2.IMREAD_UNCHANGED)
    assert (mask == logits.argmax(dim=0).numpy()).mean() > 0.999
