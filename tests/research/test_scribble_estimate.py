"""research/scribble_estimate.py on a small set of masks and a network of random weights."""

import csv
import re

import torch
from detectron2.modeling import build_model

from blpseg import get_cfg


def test_estimates_stand_beside_the_score_of_the_masks(run_tool, root, made_folder, tmp_path, capsys):
    config = str(root / "configs/Synthetic-Scribble/blpseg_tiny.yaml")
    options = [
        *("DATASETS.FOLDER.NAME", "estimated", "DATASETS.FOLDER.ROOT", str(made_folder), "MODEL.DEVICE", "cpu"),
        *(
            "DATASETS.FOLDER.CLASSES",
            "['a', 'b', 'c']",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
            "3",
            "DATALOADER.NUM_WORKERS",
            "0",
        ),
        *("MODEL.WEIGHTS", str(tmp_path / "weights.pth")),
    ]
    torch.save({"model": build_model(get_cfg(config, options)).state_dict()}, options[-1])
    output = tmp_path / "estimates.csv"
    arguments = ["--config-file", config, "--dataset", "estimated_val", "--preference", "0", "1"]
    assert run_tool("research/scribble_estimate.py", *arguments, "--output", str(output), "--opts", *options) == 0
    rows = re.findall(r"^\|\s+([01])\.0 \|(.*)\|$", capsys.readouterr().out, re.M)
    assert [number for number, _ in rows] == ["0", "1"]
    true, estimate, low, high, plain = (cell.strip() for cell in rows[0][1].split("|"))
    assert rows[1][1].split("|")[0].strip() == true  # the masks do not depend on the strokes
    assert all(0 <= float(value) <= 100 for value in (true, estimate, plain))
    assert low == high == "nan", "too few images for an interval"
    first = next(csv.DictReader(output.open()))
    assert (first["mIoU of masks"], first["estimate"], first["annotated pixels alone"]) == (true, estimate, plain)
