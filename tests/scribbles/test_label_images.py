"""Label images with another value than 255 for not annotated: nnU-Net's ignore label, 0 as unlabelled."""

import json

import cv2
import numpy as np
import pytest

from blpseg.scribbles.convert import convert_label_images, nnunet_labels
from blpseg.utils.errors import BLPSegError


@pytest.mark.parametrize(
    ("value", "stored", "expected"),
    [
        (0, [0, 1, 2, 0, 255], [255, 0, 1, 255, 255]),  # 0 as unlabelled
        (3, [0, 1, 2, 3, 3], [0, 1, 2, 255, 255]),  # nnU-Net: the highest label
        (2, [0, 1, 2, 3, 4], [0, 1, 255, 2, 3]),
        (255, [0, 1, 2, 255, 254], [0, 1, 2, 255, 254]),
    ],
)
def test_numbers_above_the_value_move_down(tmp_path, value, stored, expected):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/a.png"), np.array([stored, stored], np.uint8))
    report = convert_label_images(str(tmp_path / "in"), str(tmp_path / "out"), value, workers=1, progress=False)
    assert not report.failed
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out/a.png"), -1), [expected, expected])


def nnunet(folder, **changes):
    content = {"labels": {"background": 0, "heart": 1, "ignore": 2}, "file_ending": ".png"} | changes
    (folder / "labelsTr").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(content))
    cv2.imwrite(str(folder / "labelsTr/a.png"), np.array([[0, 1, 2]], np.uint8))
    return folder


def test_a_data_set_of_nnunet_through_the_command_line(run_tool, tmp_path):
    folder = nnunet(tmp_path / "Dataset001_x")
    assert run_tool("datasets/prepare_scribbles.py", "--nnunet", str(folder), "--output", str(tmp_path / "out")) == 0
    assert cv2.imread(str(tmp_path / "out/a.png"), -1).tolist() == [[0, 1, 255]]
    labels = str(folder / "labelsTr"), "--output", str(tmp_path / "out2")
    assert run_tool("datasets/prepare_scribbles.py", "--label-png", *labels, "--unannotated-value", "0") == 0
    assert cv2.imread(str(tmp_path / "out2/a.png"), -1).tolist() == [[255, 0, 1]]
    assert run_tool("datasets/prepare_scribbles.py", "--label-png", *labels) == 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"labels": {"background": 0}}, "no ignore label"),
        ({"labels": [1]}, "no ignore label"),
        ({"labels": {"ignore": "2"}}, "no ignore label"),
        ({"file_ending": ".nii.gz"}, "'.nii.gz' files"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, changes, word):
    with pytest.raises(BLPSegError, match=word):
        nnunet_labels(str(nnunet(tmp_path / "d", **changes)))
    with pytest.raises(BLPSegError, match="--unannotated-value 256"):
        convert_label_images(str(tmp_path / "d/labelsTr"), str(tmp_path / "out"), 256)
