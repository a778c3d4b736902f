"""Multi-scale, mirrored and tiled inference against plain loops."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from blpseg.evaluation.inference import Inference, class_map, tile_windows
from blpseg.utils.errors import BLPSegError

from .toys import ColorModel, make_image

MEAN, STD = 120.0, 60.0  # those of ColorModel


def plain_loop(model, image, scales, flip):
    """METHOD section 7 word by word: OpenCV's cubic resize of the normalised image, one forward a view."""
    height, width = image.shape[:2]
    normalised = ((image.astype(np.float64) - MEAN) / STD).astype(np.float32)
    total, views = 0.0, 0
    for scale in scales:
        size = (int(np.round(width * scale)), int(np.round(height * scale)))
        scaled = cv2.resize(normalised, size, interpolation=cv2.INTER_CUBIC)
        for mirrored in (False, True) if flip else (False,):
            view = scaled[:, ::-1].copy() if mirrored else scaled
            raw = torch.from_numpy(view).permute(2, 0, 1) * STD + MEAN
            logits = model([{"image": raw}])[0]["sem_seg"]
            logits = F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=True)[0]
            total = total + (logits.flip(-1) if mirrored else logits)
            views += 1
    return total / views


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("size", [(40, 56), (37, 51)])
def test_multi_scale_equals_the_plain_loop(size, flip):
    model, image = ColorModel(5), make_image(3, *size)
    scales = (0.5, 0.75, 1.0, 1.25)
    with torch.no_grad():
        expected = plain_loop(model, image, scales, flip)
    model.calls.clear()
    result = Inference(model, scales=scales, flip=flip)([{"image": torch.from_numpy(image).permute(2, 0, 1)}])
    torch.testing.assert_close(result[0]["sem_seg"], expected, atol=1e-5, rtol=1e-5)
    assert [len(call) for call in model.calls] == [1 + flip] * 4  # image and mirror share a forward


def test_scales_are_those_of_an_image_of_the_longest_side():
    """Pillow's cubic filter widens with the reduction, as a large photograph needs it."""
    model, image = ColorModel(5), make_image(3, 40, 56)
    inputs = [{"image": torch.from_numpy(image).permute(2, 0, 1)}]
    channels = [
        Image.fromarray(c.astype(np.float32)).resize((14, 10), Image.Resampling.BICUBIC)
        for c in np.moveaxis(image, 2, 0)
    ]
    with torch.no_grad():
        small = model([{"image": torch.from_numpy(np.stack([np.asarray(c) for c in channels]))}])[0]["sem_seg"]
    expected = F.interpolate(small[None], size=(40, 56), mode="bilinear", align_corners=True)[0]
    found = Inference(model, scales=(0.5,), longest_side=28)(inputs)
    torch.testing.assert_close(found[0]["sem_seg"], expected, atol=1e-4, rtol=1e-4)
    model.calls.clear()
    Inference(model, longest_side=56)(inputs)
    Inference(model, longest_side=28)(inputs)
    assert [call[0][-2:] for call in model.calls] == [(40, 56), (20, 28)]


def test_single_view_is_the_model_itself():
    model = ColorModel(4)
    inputs = [{"image": torch.rand(3, 20, 24) * 255, "height": 30, "width": 36}]
    assert torch.equal(Inference(model)(inputs)[0]["sem_seg"], model(inputs)[0]["sem_seg"])


def test_images_of_one_size_share_a_forward_and_keep_their_order():
    model = ColorModel(4)
    sizes = [(20, 24), (16, 16), (20, 24)]
    inputs = [{"image": torch.rand(3, *size) * 255} for size in sizes]
    together = Inference(model, scales=(1.0, 1.5), flip=True)(inputs)
    for x, result in zip(inputs, together, strict=True):
        (alone,) = Inference(model, scales=(1.0, 1.5), flip=True)([x])
        torch.testing.assert_close(result["sem_seg"], alone["sem_seg"], atol=1e-5, rtol=1e-5)
    assert sorted(len(call) for call in model.calls[:4]) == [2, 2, 4, 4]


@pytest.mark.parametrize("length, size, overlap", [(10, 10, 3), (11, 10, 3), (100, 16, 8), (97, 32, 0), (5, 10, 9)])
def test_tile_windows_cover_everything_once(length, size, overlap):
    seen = np.zeros(length, int)
    windows = list(tile_windows(length, size, overlap))
    for window, kept in windows:
        assert 0 <= window.start <= kept.start < kept.stop <= window.stop <= length
        assert window.stop - window.start == min(size, length)
        seen[kept] += 1
    assert (seen == 1).all()
    for (left, kept), (right, _) in zip(windows, windows[1:], strict=False):
        assert left.stop - right.start >= overlap
        assert abs((left.stop - kept.stop) - (kept.stop - right.start)) <= 1  # each keeps half of the overlap


@pytest.mark.parametrize("classes_only", [False, True])
def test_tiles_equal_the_whole_where_the_overlap_covers_the_receptive_field(classes_only):
    model = ColorModel(6)
    inputs = [{"image": torch.from_numpy(make_image(1, 70, 90)).permute(2, 0, 1)}]
    whole = Inference(model, classes_only=classes_only)(inputs)[0]["sem_seg"]
    model.calls.clear()
    tiled = Inference(model, tile_above=1000, tile_size=32, tile_overlap=8, classes_only=classes_only)(inputs)
    torch.testing.assert_close(tiled[0]["sem_seg"].float(), whole.float(), atol=1e-5, rtol=1e-5)
    assert {shape for call in model.calls for shape in call} == {(3, 32, 32)}


def test_class_map_is_argmax():
    logits = torch.randn(7, 9, 11)
    assert torch.equal(class_map(logits).long(), logits.argmax(0))
    assert class_map(torch.randn(300, 4, 4)).dtype == torch.int64
    ready = torch.zeros(4, 4, dtype=torch.uint8)
    assert class_map(ready) is ready


def test_tiles_that_only_overlap_are_refused():
    with pytest.raises(BLPSegError, match="OVERLAP"):
        Inference(ColorModel(2), tile_above=1, tile_overlap=512)


def test_mode_of_the_model_survives():
    from detectron2.evaluation import inference_on_dataset

    model = ColorModel(3).train()
    inference_on_dataset(Inference(model), [[{"image": torch.zeros(3, 8, 8)}]], None)
    assert model.training
