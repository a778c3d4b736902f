"""The project of photographs that the demo ends with."""

import importlib.util

import numpy as np
import pytest

from blpseg.utils.files import image_size, read_label


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="no package of photographs")
def test_every_photograph_has_its_strokes(tmp_path, run_tool):
    arguments = ("datasets/make_photos.py", "--output", str(tmp_path / "photos"))
    assert run_tool(*arguments) == 0
    photos = sorted((tmp_path / "photos/images/train").iterdir())
    assert [photo.stem for photo in photos] == ["astronaut", "chelsea", "coffee", "rocket"]
    classes = {}
    for photo in photos:
        label = read_label(str(tmp_path / f"photos/scribbles/train/{photo.stem}.png"))
        assert label.shape == image_size(str(photo))
        classes[photo.stem] = set(np.unique(label)) - {255}
        assert 0.005 < (label != 255).mean() < 0.1
    assert classes == {"astronaut": {0, 1, 4}, "chelsea": {0, 2}, "coffee": {0, 3}, "rocket": {0, 4}}
    # What a person draws later stays.
    stroke = tmp_path / "photos/strokes/coffee.json"
    stroke.write_text("mine")
    assert run_tool(*arguments) == 0 and stroke.read_text() == "mine"
