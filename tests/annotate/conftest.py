"""A small project of generated photographs, and its application."""

import cv2
import numpy as np
import pytest

from blpseg.annotate.store import Project

CLASSES = ["background", "leaf", "stem & <b>flower</b>"]


@pytest.fixture
def photos(tmp_path):
    """A folder of three photos of two textures; one is upright only with its EXIF orientation, one is grey."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (height, width) in (("a.jpg", (60, 80)), ("b c.png", (48, 64)), ("d#1.png", (40, 40))):
        image = rng.normal(60, 10, (height, width, 3))
        image[height // 4 : -height // 4, width // 4 : -width // 4] += (20, 110, 40)
        cv2.imwrite(str(folder / name), image.clip(0, 255).astype(np.uint8))
    return folder


@pytest.fixture
def project(tmp_path, photos):
    made = Project(tmp_path / "project", photos, CLASSES)
    yield made
    made.close()


def stroke(number, *points, width=3, **more):
    return {"class": number, "width": width, "points": [list(p) for p in points], "time": 1.5, **more}
