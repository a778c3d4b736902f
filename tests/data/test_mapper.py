"""The mapper and its augmentation against slow plain versions of METHOD section 6."""

import cv2
import numpy as np
import pytest

from blpseg.data.augmentation import TrainingAugmentation
from blpseg.data.dataset_mapper import ScribbleDatasetMapper
from blpseg.data.datasets import load_records
from blpseg.utils.errors import BLPSegError

MEAN = (123.675, 116.28, 103.53)
NO_JITTER = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


class Draws:
    """A generator that draws what it is told: flip, scale, angle, top, left, then brightness, contrast, ..."""

    def __init__(self, flip=0.9, scale=0.5, angle=0.5, top=0.0, left=0.0, jitter=(0.5, 0.5, 0.5, 0.5)):
        self.values = np.array([flip, scale, angle, top, left, *jitter])

    def random(self, count):
        assert count == len(self.values)
        return self.values


def augmentation(**changes):
    settings = {
        "flip": "horizontal",
        "scale_range": (1.0, 1.0),
        "rotation_degrees": 0.0,
        "crop_size": (24, 20),
        "color_jitter": NO_JITTER,
        "pixel_mean": MEAN,
        "image_format": "RGB",
    }
    return TrainingAugmentation(**(settings | changes))


def scene(height=40, width=30):
    rng = np.random.default_rng(height)
    image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 1.5)
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX), rng.integers(0, 5, (height, width), np.uint8)


def cubic_loop(image, height, width):
    """Cubic convolution (a = -0.75) about pixel centres, edge pixels repeated, rounded to 8 bits."""

    def weights(length, new):
        matrix = np.zeros((new, length))
        for i in range(new):
            centre = (i + 0.5) * length / new - 0.5
            for k in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                d, a = abs(centre - k), -0.75
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
                matrix[i, min(max(k, 0), length - 1)] += w
        return matrix

    result = np.einsum(
        "ih,hwc,jw->ijc", weights(image.shape[0], height), image.astype(float), weights(image.shape[1], width)
    )
    return np.clip(np.round(result), 0, 255)


def test_crop_takes_a_window_of_image_and_label():
    image, label = scene()
    out, out_label = augmentation()(image, label, Draws(top=0.5, left=0.999))
    top, left = 8, 10  # of 17 and 11 possible offsets
    np.testing.assert_array_equal(out, image[top : top + 24, left : left + 20].transpose(2, 0, 1))
    np.testing.assert_array_equal(out_label, label[top : top + 24, left : left + 20])
    assert out.dtype == np.float32 and out_label.dtype == np.uint8


def test_every_offset_is_as_likely():
    image = np.zeros((4, 4, 3), np.uint8)
    label = np.arange(16, dtype=np.uint8).reshape(4, 4)
    seen = np.zeros(16, int)
    for seed in range(900):
        _, out = augmentation(crop_size=(2, 2), flip="none")(image, label, np.random.default_rng(seed))
        seen[out[0, 0]] += 1
    starts = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert seen[starts].sum() == 900 and seen[starts].min() > 65 and seen[starts].max() < 140


@pytest.mark.parametrize("top, left, row, column", [(0.0, 0.0, 0, 0), (0.999, 0.999, 10, 20), (0.5, 0.5, 5, 10)])
def test_short_sides_are_padded_with_the_mean_at_an_offset(top, left, row, column):
    image, label = scene(30, 40)
    out, out_label = augmentation(crop_size=(40, 60))(image, label, Draws(top=top, left=left))
    inside = np.zeros((40, 60), bool)
    inside[row : row + 30, column : column + 40] = True
    np.testing.assert_array_equal(out[:, inside].T.reshape(30, 40, 3), image)
    np.testing.assert_array_equal(out_label[inside].reshape(30, 40), label)
    assert (out_label[~inside] == 255).all()
    # Exactly 0 after normalisation.
    assert (out - np.float32(MEAN)[:, None, None])[:, ~inside].any() == 0


def test_flip_before_the_rest():
    image, label = scene()
    out, out_label = augmentation()(image, label, Draws(flip=0.4999))
    np.testing.assert_array_equal(out, image[:24, ::-1][:, :20].transpose(2, 0, 1))
    np.testing.assert_array_equal(out_label, label[:24, ::-1][:, :20])
    kept, _ = augmentation()(image, label, Draws(flip=0.5))
    np.testing.assert_array_equal(kept, image[:24, :20].transpose(2, 0, 1))
    upside, _ = augmentation(flip="vertical")(image, label, Draws(flip=0.1))
    np.testing.assert_array_equal(upside, image[::-1][:24, :20].transpose(2, 0, 1))
    none, _ = augmentation(flip="none")(image, label, Draws(flip=0.1))
    np.testing.assert_array_equal(none, kept)


@pytest.mark.parametrize("draw, scale", [(0.0, 0.75), (1.0, 1.25), (0.3, 0.9), (0.66, 1.08)])
def test_scale_is_cubic_for_the_image_and_nearest_for_the_label(draw, scale):
    image, label = scene(41, 33)
    height, width = round(41 * scale), round(33 * scale)
    out, out_label = augmentation(scale_range=(0.75, 1.25), crop_size=(height, width))(image, label, Draws(scale=draw))
    # OpenCV computes with weights of 11 bits.
    assert np.abs(out - cubic_loop(image, height, width).transpose(2, 0, 1)).max() <= 1
    rows = ((np.arange(height) + 0.5) * 41 / height).astype(int)
    columns = ((np.arange(width) + 0.5) * 33 / width).astype(int)
    np.testing.assert_array_equal(out_label, label[rows[:, None], columns])


def test_scales_are_those_of_an_image_of_the_longest_side():
    """Halves of a half: each pixel is the mean of four by four."""
    image, label = scene(40, 32)
    out, out_label = augmentation(scale_range=(0.5, 0.5), crop_size=(10, 8), longest_side=20)(image, label, Draws())
    means = image.reshape(10, 4, 8, 4, 3).mean(axis=(1, 3))
    assert np.abs(out - means.transpose(2, 0, 1)).max() <= 0.5
    np.testing.assert_array_equal(out_label, label[2::4, 2::4])
    unchanged, _ = augmentation(crop_size=(40, 32), longest_side=40)(image, label, Draws())
    np.testing.assert_array_equal(unchanged, image.transpose(2, 0, 1))


def test_overshoot_of_the_cubic_saturates():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    out, _ = augmentation(scale_range=(1.25, 1.25), crop_size=(50, 50))(image, image[..., 0] // 255, Draws())
    assert out.min() == 0 and out.max() == 255


def test_rotation_by_a_right_angle_is_exact_and_others_keep_image_and_label_together():
    image, label = scene(32, 32)
    out, out_label = augmentation(rotation_degrees=90, crop_size=(32, 32))(image, label, Draws(angle=1.0))
    np.testing.assert_array_equal(out_label, np.rot90(label))
    np.testing.assert_array_equal(out, np.rot90(image).transpose(2, 0, 1))

    blocks = np.kron(np.arange(1, 5, dtype=np.uint8).reshape(2, 2), np.ones((30, 30), np.uint8))
    painted = np.repeat(blocks[..., None] * 50, 3, 2)
    out, out_label = augmentation(rotation_degrees=30, crop_size=(60, 60))(painted, blocks, Draws(angle=0.9))
    padding = out_label == 255
    assert 0 < padding.mean() < 0.3
    assert (out[:, padding] == np.float32(MEAN)[:, None]).all()
    inner = cv2.erode((~padding).astype(np.uint8), np.ones((7, 7))) > 0
    for value in range(1, 5):  # away from edges the colour still tells the label
        core = cv2.erode((out_label == value).astype(np.uint8), np.ones((7, 7))) > 0
        assert (np.abs(out[0, core & inner] - value * 50) <= 1).all()


def test_jitter_is_brightness_contrast_saturation_hue_and_moves_no_crop():
    image, label = scene()
    plain, plain_label = augmentation()(image, label, np.random.default_rng(3))
    strong = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2}
    jittered, jittered_label = augmentation(color_jitter=strong)(image, label, np.random.default_rng(3))
    np.testing.assert_array_equal(plain_label, jittered_label)
    assert np.abs(plain - jittered).mean() > 3

    bright, _ = augmentation(color_jitter=NO_JITTER | {"brightness": 0.5})(
        image, label, Draws(jitter=(1, 0.5, 0.5, 0.5))
    )
    expected = image[:24, :20].transpose(2, 0, 1).astype(float)
    np.testing.assert_allclose(bright, np.clip(expected * 1.5, 0, 255), atol=1)
    grey, _ = augmentation(color_jitter=NO_JITTER | {"saturation": 1})(image, label, Draws(jitter=(0.5, 0.5, 0, 0.5)))
    luma = np.tensordot([0.2989, 0.587, 0.114], expected, 1)
    np.testing.assert_allclose(grey, np.broadcast_to(luma, grey.shape), atol=1.5)
    # BGR images are jittered as the same colours.
    swapped, _ = augmentation(color_jitter=strong, image_format="BGR", pixel_mean=MEAN[::-1])(
        np.ascontiguousarray(image[..., ::-1]), label, np.random.default_rng(3)
    )
    np.testing.assert_array_equal(swapped[::-1], jittered)


@pytest.mark.parametrize("crop", [["INPUT.CROP.SIZE", [0.9, 0.9]], ["INPUT.CROP.TYPE", "relative"]])
def test_crops_are_of_whole_pixels(made_cfg, crop):
    with pytest.raises(BLPSegError, match="^INPUT.CROP"):
        TrainingAugmentation(made_cfg(*crop))


def test_training_record_becomes_tensors(made_cfg):
    mapper = ScribbleDatasetMapper(
        made_cfg("INPUT.SCALE_RANGE", [1.0, 1.0], "INPUT.CROP.SIZE", [60, 60]), is_train=True
    )
    record = load_records("made_train")[0]
    sample = mapper(record, Draws())
    assert sample["image"].shape == (3, 60, 60) and str(sample["image"].dtype) == "torch.float32"
    assert sample["scribble"].shape == (60, 60) and str(sample["scribble"].dtype) == "torch.int64"
    stored = cv2.imread(record["scribble_file_name"], cv2.IMREAD_UNCHANGED).astype(int)
    stored[stored == 255] = 3
    height, width = stored.shape
    np.testing.assert_array_equal(sample["scribble"][:height, :width], stored)
    assert (sample["scribble"][height:] == 255).all() and (sample["scribble"][:, width:] == 255).all()
    assert {k: sample[k] for k in record} == record and "image" not in record
    assert mapper(record)["image"].shape == (3, 60, 60)  # Detectron2's loaders pass no generator


def test_image_classes_are_those_before_the_crop_and_background(made_cfg, made_folder):
    path = made_folder / "scribbles/train/train0.png"
    scribble = np.full((40, 52), 255, np.uint8)
    scribble[39, 51] = 2
    cv2.imwrite(str(path), scribble)
    mapper = ScribbleDatasetMapper(made_cfg("INPUT.CROP.SIZE", [8, 8], "INPUT.RANDOM_FLIP", "none"), is_train=True)
    sample = mapper(load_records("made_train")[0], Draws())
    assert (sample["scribble"] == 3).all()
    assert sample["image_classes"].tolist() == [True, False, True]


def test_dense_supervision_reads_the_mask_and_ignores_its_ignore_label(made_cfg, made_folder):
    path = made_folder / "masks/train/train0.png"
    mask = np.zeros((40, 52), np.uint8)
    mask[:10], mask[10:20] = 1, 7
    cv2.imwrite(str(path), mask)
    cfg = made_cfg(
        *("INPUT.SUPERVISION", "dense", "DATASETS.FOLDER.IGNORE_LABEL", 7, "INPUT.SCALE_RANGE", [1.0, 1.0]),
        *("INPUT.CROP.SIZE", [40, 52]),
    )
    sample = ScribbleDatasetMapper(cfg, is_train=True)(load_records("made_train")[0], Draws())
    expected = mask.astype(int)
    expected[expected == 7] = 3
    np.testing.assert_array_equal(sample["scribble"], expected)
    assert sample["image_classes"].tolist() == [True, True, False]


def test_evaluation_keeps_the_size_and_needs_no_label(made_cfg):
    mapper = ScribbleDatasetMapper(made_cfg("INPUT.FORMAT", "BGR"), is_train=False)
    record = load_records("made_val")[1]
    sample = mapper(record)
    np.testing.assert_array_equal(sample["image"], cv2.imread(record["file_name"]).transpose(2, 0, 1))
    assert str(sample["image"].dtype) == "torch.uint8" and "scribble" not in sample


def test_bad_labels_are_named(made_cfg, made_folder):
    mapper = ScribbleDatasetMapper(made_cfg(), is_train=True)
    record = load_records("made_train")[0]
    path = record["scribble_file_name"]
    cv2.imwrite(path, np.full((40, 52), 3, np.uint8))
    with pytest.raises(BLPSegError, match=f"^{path}: label value 3 is out of range"):
        mapper(record)
    cv2.imwrite(path, np.zeros((52, 40), np.uint8))
    with pytest.raises(BLPSegError, match=f"^{path}: the label is 40 x 52 pixels, the image .* 52 x 40"):
        mapper(record)
    with pytest.raises(BLPSegError, match="has no scribble_file_name"):
        mapper({k: v for k, v in record.items() if k != "scribble_file_name"})
    with pytest.raises(BLPSegError, match="SUPERVISION"):
        ScribbleDatasetMapper(made_cfg("INPUT.SUPERVISION", "boxes"), is_train=True)
