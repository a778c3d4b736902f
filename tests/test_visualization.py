"""Pictures: what is unlabelled shows as such, strokes grow towards the nearest, legends name classes."""

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from blpseg.visualization import (
    UNLABELLED_COLOR,
    colorize,
    heat_map,
    labelled_overlay,
    legend,
    overlay,
    panels,
    result_panels,
    thicken,
)

COLORS = [(0, 0, 0), (200, 30, 40), (20, 180, 60)]
rng = np.random.default_rng(0)
IMAGE = rng.integers(0, 256, (30, 44, 3), np.uint8)
LABEL = rng.choice([0, 1, 2, 255], (30, 44)).astype(np.uint8)


@pytest.fixture
def metadata(made_cfg):
    made_cfg()
    return MetadataCatalog.get("made_train")


def test_colorize():
    picture = colorize(LABEL, COLORS)
    for row in range(30):
        for column in range(44):
            value = LABEL[row, column]
            assert tuple(picture[row, column]) == (COLORS[value] if value < 3 else UNLABELLED_COLOR)


def test_overlay_mixes_classes_and_washes_out_the_rest():
    picture = overlay(IMAGE, LABEL, COLORS, alpha=0.25).astype(int)
    known = LABEL < 3
    expected = 0.75 * IMAGE[known] + 0.25 * np.array(COLORS)[LABEL[known]]
    assert np.abs(picture[known] - expected).max() <= 0.51
    rest = picture[~known]
    assert (rest[:, 0] == rest[:, 1]).all() and (rest[:, 1] == rest[:, 2]).all() and rest.min() >= 127


def test_thicken_takes_the_nearest_stroke():
    label = np.full((25, 25), 255, np.uint8)
    label[3, 4:15], label[20, 2:6], label[10:22, 18] = 1, 0, 2
    strokes = np.argwhere(label != 255)
    grown = thicken(label, 3, num_classes=3)
    for row in range(25):
        for column in range(25):
            distances = np.hypot(*(strokes - (row, column)).T)
            if distances.min() < 2.7:  # OpenCV's distances are within a few percent
                near = {label[tuple(s)] for s in strokes[distances < distances.min() + 0.3]}
                assert grown[row, column] in near
            elif distances.min() > 3.3:
                assert grown[row, column] == 255
    empty = np.full((5, 5), 255, np.uint8)
    np.testing.assert_array_equal(thicken(empty, 3, 3), empty)


def test_heat_map_and_regions(metadata):
    picture = heat_map(np.linspace(0, 1, 50)[None])
    assert picture.shape == (1, 50, 3) and (np.diff(picture[0].astype(int).sum(1)) >= -3).all()
    drawn = labelled_overlay(IMAGE, LABEL, metadata)
    assert drawn.ndim == 3 and min(drawn.shape[:2]) >= 256


def test_legend_wraps_and_names_what_is_no_class():
    one = legend(["background", "apple", "pear"], COLORS, 600)
    two = legend(["background", "apple", "pear"], COLORS, 120)
    assert one.shape[1] == 600 and two.shape[1] == 120 and two.shape[0] > one.shape[0]
    for color in [*COLORS, UNLABELLED_COLOR]:
        assert (one == color).all(2).sum() >= 100
    few = legend(["background", "apple", "pear"], COLORS, 600, present=[2])
    assert not (few == COLORS[1]).all(2).any() and (few == COLORS[2]).all(2).sum() >= 100


def test_legend_cuts_no_name_and_grows_with_the_picture():
    long = legend(["background", "a name of more than eighty pixels"], COLORS, 80)
    assert long.shape[1] > 80 and (long[:, -5:] == 255).all()
    assert legend(["background"], COLORS, 5000).shape[0] > 2 * legend(["background"], COLORS, 400).shape[0]


@pytest.mark.parametrize("label, shown", [(LABEL, True), (LABEL % 3, False)])
def test_no_label_is_in_the_legend_where_it_is_in_the_picture(metadata, label, shown):
    picture = result_panels(np.zeros_like(IMAGE), metadata, maps={"truth": label})
    below = picture[picture.shape[0] - 28 :]  # the legend alone
    assert (below == UNLABELLED_COLOR).all(2).any() == shown


def test_panels(metadata):
    grid = panels({"one": IMAGE, "two": IMAGE, "three": IMAGE}, columns=2)
    single = panels({"one": IMAGE})
    assert grid.shape[0] == 2 * single.shape[0] and grid.shape[1] > 2 * 256 * 44 // 30
    full = result_panels(
        IMAGE,
        metadata,
        scribble=LABEL,
        heat_maps={"annotation probability": rng.random((30, 44))},
        maps={"prediction": LABEL % 3, "truth": LABEL % 3},
    )
    assert full.dtype == np.uint8 and full.shape[1] > 4 * single.shape[1]
    padding = np.zeros((30, 44), bool)
    padding[:, :10] = True
    padded = result_panels(IMAGE, metadata, scribble=LABEL, padding=padding)
    plain = result_panels(IMAGE, metadata, scribble=LABEL)
    assert (padded == (70, 74, 110)).all(2).sum() > 2 * 256 * 60 and not (plain == (70, 74, 110)).all(2).any()


@pytest.mark.parametrize("source, names", [("annotation", "made_train_train0.png"), ("dataloader", "00000_")])
def test_command_line(made_folder, tmp_path, run_tool, source, names):
    status = run_tool(
        *("tools/visualize_data.py", "--source", source, "--output-dir", str(tmp_path / "out"), "--num-images", "3"),
        *("DATASETS.TRAIN", "('made_train',)", "DATASETS.FOLDER.NAME", "made"),
        *("DATASETS.FOLDER.ROOT", str(made_folder), "DATASETS.FOLDER.TRAIN_MASKS", "masks/train"),
        *("DATASETS.FOLDER.CLASSES", "['background','apple','pear']", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"),
        *("INPUT.CROP.SIZE", "[64,64]", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2"),
    )
    assert status == 0
    written = sorted((tmp_path / "out").iterdir())
    assert len(written) == 3 and written[0].name.startswith(names)
    assert cv2.imread(str(written[0])).shape[1] > 256
