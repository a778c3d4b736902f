#!/usr/bin/env python
"""Make a project of four photographs with a few strokes on each: what `make demo` ends with and README shows.

The photographs are those that the package scikit-image carries: Eileen Collins (NASA, public domain), Chelsea
(Stefan van der Walt, CC0), a cup of coffee (Rachel Michetti, CC0) and a Falcon 9 (SpaceX, public domain).
"""

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from blpseg.annotate.store import Project
from blpseg.utils.cli import add_debug_flag, run_command
from blpseg.utils.errors import BLPSegError
from blpseg.utils.paths import data_root

CLASSES = ("background", "person", "cat", "cup", "rocket")
WIDTH = 7  # of a stroke, pixels
# file -> class -> strokes of (x, y)
STROKES = {
    "astronaut.png": {
        "background": [
            [(120, 15), (130, 70), (110, 140)],
            [(320, 30), (340, 120), (335, 220)],
            [(490, 20), (485, 120), (480, 220)],
            [(30, 60), (40, 220), (75, 170)],
            [(330, 410), (400, 470), (460, 420)],
            [(385, 315), (440, 305), (495, 335)],
        ],
        "person": [
            [(175, 85), (215, 45), (265, 60), (285, 100)],
            [(205, 110), (235, 150), (250, 110)],
            [(80, 300), (120, 330), (210, 335), (310, 300)],
            [(60, 430), (120, 460), (230, 480)],
            [(135, 190), (180, 250), (260, 280)],
        ],
        "rocket": [[(420, 20), (415, 100), (405, 190), (420, 250)]],
    },
    "chelsea.png": {
        "background": [[(12, 20), (10, 90)], [(400, 60), (430, 110), (425, 200)], [(405, 255), (435, 285)]],
        "cat": [
            [(60, 120), (100, 60), (200, 40), (300, 50)],
            [(160, 110), (190, 120)],
            [(30, 200), (80, 260), (180, 280)],
            [(120, 180), (200, 200), (260, 250)],
            [(240, 120), (250, 200), (315, 140), (320, 200)],
            [(375, 20), (365, 60)],
        ],
    },
    "coffee.png": {
        "background": [
            [(30, 160), (40, 300), (80, 370)],
            [(150, 30), (60, 60), (20, 40)],
            [(500, 40), (560, 150), (520, 320)],
            [(470, 380), (560, 385)],
        ],
        "cup": [
            [(190, 110), (220, 50), (300, 30), (380, 70)],
            [(230, 130), (300, 160), (350, 120)],
            [(110, 200), (130, 300), (230, 360), (330, 365)],
            [(440, 160), (460, 220), (430, 300)],
            [(225, 260), (215, 285)],
            [(370, 290), (385, 215), (408, 110)],
        ],
    },
    "rocket.jpg": {
        "background": [
            [(120, 50), (250, 60), (270, 250), (250, 340)],
            [(380, 60), (500, 80), (530, 250), (390, 320)],
            [(70, 50), (40, 200), (30, 350)],
            [(192, 220), (185, 350)],
            [(590, 100), (610, 300)],
            [(450, 220), (458, 350)],
            [(110, 405), (200, 395), (250, 400)],
            [(380, 400), (440, 400), (560, 410)],
        ],
        "rocket": [[(321, 140), (322, 250), (322, 390)]],
    },
}


def photographs() -> Path:
    """Where scikit-image keeps them; its code is not needed."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise BLPSegError("the photographs are those of scikit-image, which is missing; pip install scikit-image")
    return Path(package.submodule_search_locations[0]) / "data"


def make_photos(output: str | os.PathLike) -> bool:
    """The project in ``output``; False if one lies there already, which is left as it is."""
    if (Path(output) / "config.yaml").exists():
        return False
    with tempfile.TemporaryDirectory() as folder:
        for name in STROKES:
            shutil.copy(photographs() / name, folder)
        project = Project(output, folder, CLASSES)
    for name, strokes in STROKES.items():
        drawn = [
            {"class": CLASSES.index(kind), "width": WIDTH, "points": [list(point) for point in points], "time": 0}
            for kind, lines in strokes.items()
            for points in lines
        ]
        project.write(project.photo(name), {"strokes": drawn})
    project.close()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.path.join(data_root(), "photos")
    parser.add_argument("--output", default=default, help=f"the project's folder (default: {default})")
    arguments = add_debug_flag(parser).parse_args()
    made = make_photos(arguments.output)
    print(f"{arguments.output}: {len(STROKES)} photographs with strokes, {'made' if made else 'there already'}")


if __name__ == "__main__":
    run_command(main)
