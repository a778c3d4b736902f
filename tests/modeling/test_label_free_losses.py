"""Losses that need no labels against loops over pixels and pairs of grid cells, in float64, and through the model."""

import math

import pytest
import torch
from detectron2.modeling import build_model

from blpseg import get_cfg
from blpseg.modeling.losses import DenseCRF, EntropyMinimization, GatedCRF, build_losses
from blpseg.modeling.outputs import Outputs, Targets
from blpseg.utils.errors import BLPSegError

from .test_losses import CLASSES
from .test_model import sample

STD = [58.0, 30.0, 71.0]
NAMES = {"EntropyMinimization": "loss_entropy", "GatedCRF": "loss_gated_crf", "DenseCRF": "loss_dense_crf"}


def make(name, radius=3, max_positions=100):
    if name == "EntropyMinimization":
        loss = EntropyMinimization()
    elif name == "GatedCRF":
        loss = GatedCRF(radius=radius, sigma_xy=2.5, sigma_rgb=0.2, pixel_std=STD)
    else:
        loss = DenseCRF(sigma_xy=9.0, sigma_rgb=40.0, max_positions=max_positions, pixel_std=STD)
    return called(loss)


def called(loss):
    """The loss as a function of logits, images and scribble, all that it looks at."""

    def call(logits, images, scribble):
        return loss(Outputs(logits, None, None, None, None), Targets(scribble, None, None), images)

    return call


def random_case(seed, n=2, grid=(5, 7), size=(18, 27), annotated=0.3):
    """float64; cells that are whole, half and all padding, another number of them in each image."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, CLASSES, *grid, generator=g, dtype=torch.float64)
    images = torch.randn(n, 3, *size, generator=g, dtype=torch.float64)
    label = torch.randint(CLASSES, (n, *size), generator=g)
    scribble = torch.where(torch.rand(n, *size, generator=g) < annotated, label, CLASSES)
    scribble[0, :, -6:] = 255
    scribble[1:, -5:] = 255
    scribble[1:, :3] = 255
    return logits, images, scribble


def bins(pixels, cells):
    """The pixels of each grid cell along an axis, those cut by its border included."""
    return [range(i * pixels // cells, -(-(i + 1) * pixels // cells)) for i in range(cells)]


def cell_pixels(size, grid):
    rows, columns = bins(size[0], grid[0]), bins(size[1], grid[1])
    return {(i, j): [(r, c) for r in rows[i] for c in columns[j]] for i in range(grid[0]) for j in range(grid[1])}


def loop_entropy(logits, images, scribble):
    result = []
    for s, y in zip(logits, scribble, strict=True):
        top, bottom = s.new_zeros(()), 0.0
        for (i, j), pixels in cell_pixels(y.shape, s.shape[1:]).items():
            p = s[:, i, j].softmax(0)
            entropy = -sum(v * v.log() for v in p)
            for r, c in pixels:
                if int(y[r, c]) == CLASSES:
                    top, bottom = top + entropy / len(pixels), bottom + 1 / len(pixels)
        result.append(top / bottom if bottom else top)
    return sum(result) / len(result)


def cells_of(s, x, y):
    """For each cell with pixels of the image: (row, column), probabilities, mean colour in 0..255 but for the mean."""
    found = []
    for (i, j), pixels in cell_pixels(y.shape, s.shape[1:]).items():
        inside = [(r, c) for r, c in pixels if int(y[r, c]) != 255]
        if inside:
            color = [std * sum(float(x[k, r, c]) for r, c in inside) / len(inside) for k, std in enumerate(STD)]
            found.append(((i, j), s[:, i, j].softmax(0), color))
    return found


def squared(a, b):
    return sum((u - v) ** 2 for u, v in zip(a, b, strict=True))


def loop_gated(logits, images, scribble, radius=3, sigma_xy=2.5, sigma_rgb=0.2):
    result = []
    for s, x, y in zip(logits, images, scribble, strict=True):
        cells, energy = cells_of(s, x, y), s.new_zeros(())
        for a, p, color in cells:
            for b, q, other in cells:
                if a != b and max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= radius:
                    near = squared(a, b) / (2 * sigma_xy**2)
                    alike = squared(color, other) / 255**2 / (2 * sigma_rgb**2)
                    energy = energy + math.exp(-near - alike) * (1 - p @ q)
        result.append(energy / max(len(cells), 1))
    return sum(result) / len(result)


def dense_of(cells, step, sigma_xy=9.0, sigma_rgb=40.0):
    energy, total = 0.0, 0.0
    for a, p, color in cells:
        for b, q, other in cells:
            near = squared([a[0] * step[0], a[1] * step[1]], [b[0] * step[0], b[1] * step[1]]) / (2 * sigma_xy**2)
            weight = math.exp(-near - squared(color, other) / (2 * sigma_rgb**2))
            energy, total = energy + weight * (p * (1 - q)).sum(), total + weight
    return energy / total


def loop_dense(logits, images, scribble, **sigmas):
    result = []
    for s, x, y in zip(logits, images, scribble, strict=True):
        step = [pixels / cells for pixels, cells in zip(y.shape, s.shape[1:], strict=True)]
        cells = cells_of(s, x, y)
        result.append(dense_of(cells, step, **sigmas) if cells else s.new_zeros(()))
    return sum(result) / len(result)


def loop_dense_by_squares(logits, images, scribble, k):
    """Means over squares of k x k cells, of those that are in the image: place, probabilities and colour."""
    result = []
    for s, x, y in zip(logits, images, scribble, strict=True):
        step = [pixels / cells for pixels, cells in zip(y.shape, s.shape[1:], strict=True)]
        squares = {}
        for (i, j), p, color in cells_of(s, x, y):
            members = squares.setdefault((i // k, j // k), [])
            members.append((torch.tensor([i, j]).double(), p, torch.tensor(color, dtype=torch.float64)))
        means = [tuple(sum(v) / len(v) for v in zip(*members, strict=True)) for members in squares.values()]
        result.append(dense_of([(a.tolist(), p, color.tolist()) for a, p, color in means], step))
    return sum(result) / len(result)


LOOPS = {"EntropyMinimization": loop_entropy, "GatedCRF": loop_gated, "DenseCRF": loop_dense}


def check(function, loop, logits, images, scribble):
    logits = logits.clone().requires_grad_(True)
    reference = logits.detach().clone().requires_grad_(True)
    loss, expected = function(logits, images, scribble), loop(reference, images, scribble)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, reference)
    assert expected_gradient.any()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(name):
    check(make(name), LOOPS[name], *random_case(0))


@pytest.mark.parametrize("radius", [1, 20])
def test_gated_crf_windows_of_neighbours_and_beyond_the_grid(radius):
    check(make("GatedCRF", radius=radius), lambda *case: loop_gated(*case, radius=radius), *random_case(2, n=1))


@pytest.mark.parametrize(("max_positions", "k"), [(35, 1), (34, 2), (12, 2), (11, 3)])
def test_dense_crf_averages_grids_of_too_many_positions(max_positions, k):
    check(make("DenseCRF", max_positions=max_positions), lambda *case: loop_dense_by_squares(*case, k), *random_case(3))


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_in_the_padding_makes_no_difference(name):
    logits, images, scribble = random_case(4, n=1)  # columns 21.. of 27 are padding: cells 6.. (5 holds column 20)
    logits.requires_grad_(True)
    loss = make(name)(logits, images, scribble)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[..., :6].any() and not gradient[..., 6:].any()
    images[..., 21:] = 9.0
    changed = logits.detach().clone()
    changed[..., 6:] = 7 * changed[..., :1]
    torch.testing.assert_close(make(name)(changed, images, scribble), loss.detach(), rtol=0, atol=0)


def test_entropy_leaves_annotated_pixels_out():
    logits, images, scribble = random_case(5, grid=(3, 4), size=(12, 16), annotated=0.0)
    scribble[:, 4:8, 4:8] = 1  # the pixels of cell (1, 1), all of them
    logits.requires_grad_(True)
    make("EntropyMinimization")(logits, images, scribble).backward()
    assert logits.grad[0, :, 1, 0].any() and not logits.grad[:, :, 1, 1].any()


@pytest.mark.parametrize("name", NAMES)
def test_images_of_which_nothing_takes_part_count_as_zero(name):
    logits, images, scribble = random_case(6)
    one = make(name)(logits[:1], images[:1], scribble[:1])
    scribble[1] = 255
    logits.requires_grad_(True)
    loss = make(name)(logits, images, scribble)
    loss.backward()
    torch.testing.assert_close(loss.detach(), one / 2)  # the mean over images, one of which is 0
    assert torch.isfinite(logits.grad).all() and not logits.grad[1].any()
    scribble[:] = 255
    if name == "EntropyMinimization":
        scribble[1] = 2  # annotated everywhere
    logits.grad = None
    loss = make(name)(logits, images, scribble)
    loss.backward()
    assert float(loss.detach()) == 0 and not logits.grad.any()


@pytest.mark.parametrize("name", ["GatedCRF", "DenseCRF"])
def test_one_sure_label_everywhere_costs_nothing_and_an_edge_in_a_flat_image_does(name):
    _, images, scribble = random_case(7)
    logits = torch.zeros(2, CLASSES, 5, 7)
    logits[:, 1] = 1000.0
    assert float(make(name)(logits, images.float(), scribble)) == 0
    logits[:, 2, :, :3] = 2000.0
    flat = make(name)(logits, 0 * images.float(), scribble)
    images[..., : 3 * 27 // 7] += 50.0  # the edge is one of the image, too
    assert float(flat) > 0.1 > 0.01 > float(make(name)(logits, images.float(), scribble))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name):
    logits, images, scribble = random_case(8)
    low = (100 * logits).half().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = make(name)(low, images.float(), scribble)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(low.grad).all()
    torch.testing.assert_close(loss.detach(), make(name)(low.detach().float(), images.float(), scribble))
    exact = make(name)(low.detach().double(), images, scribble)
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-4, atol=1e-6)


def test_through_the_model(tiny_cfg):
    tiny_cfg.MODEL.BLPSEG.DECODER.DROPOUT = 0.0
    for name in NAMES:
        tiny_cfg.MODEL.BLPSEG.LOSSES[name] = 1.0
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    assert not any("losses" in key for key in model.state_dict())
    batch = [sample(64, 64), sample(40, 47, seed=1)]
    losses = model(batch)
    assert set(losses) == {"loss_seg", "loss_annotation", *NAMES.values()}
    assert {model.loss_weights(batch)[name] for name in NAMES.values()} == {2.0}  # means over images
    head = model.sem_seg_head
    parameters = [*head.predictor.parameters(), *head.annotation_head.parameters()]
    for name in NAMES.values():
        assert losses[name].dim() == 0 and losses[name] > 0
        gradients = torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
        assert all(g.any() for g in gradients[: len(gradients) // 2])
        assert all(g is None for g in gradients[len(gradients) // 2 :])

    for name in ("BLPLoss", *NAMES):
        tiny_cfg.MODEL.BLPSEG.LOSSES[name] = 3.0
    model.losses = build_losses(tiny_cfg)
    with torch.no_grad():
        for name, value in model(batch).items():
            expected = losses[name].detach() * (1 if name == "loss_annotation" else 3)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert set(model.eval()(batch)[0]) == {"sem_seg"}


def test_built_from_the_config():
    options = ["MODEL.BLPSEG.LOSSES.DenseCRF", 0.5, "MODEL.BLPSEG.LOSSES.GatedCRF", 0.1, "MODEL.PIXEL_STD", STD]
    built = build_losses(get_cfg("", options))
    assert {name: loss.loss_weight for name, loss in built.items()} == {
        "loss_seg": 1.0, "loss_annotation": 1.0, "loss_dense_crf": 0.5, "loss_gated_crf": 0.1,
    }  # fmt: skip
    case = random_case(9, n=1)
    check(called(built["loss_dense_crf"]), lambda *x: loop_dense(*x, sigma_xy=100.0, sigma_rgb=15.0), *case)
    check(called(built["loss_gated_crf"]), lambda *x: loop_gated(*x, radius=5, sigma_xy=6.0, sigma_rgb=0.1), *case)
    assert list(build_losses(get_cfg())) == ["loss_seg", "loss_annotation"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.BLPSEG.LOSSES.GatedCrf", 1.0], "'GatedCrf' is unknown; choose among AnnotationLoss, BLPLoss, Dense"),
        (["MODEL.BLPSEG.LOSSES.GatedCRF", 1.0, "MODEL.BLPSEG.GATED_CRF.RADIUS", 0], "GATED_CRF.RADIUS"),
        (["MODEL.BLPSEG.LOSSES.DenseCRF", 1.0, "MODEL.BLPSEG.DENSE_CRF.SIGMA_XY", 0.0], "DENSE_CRF.SIGMA_XY"),
        (["MODEL.BLPSEG.LOSSES.GatedCRF", -1.0], "LOSSES.GatedCRF is a weight, a number >= 0; got -1.0"),
        (["MODEL.BLPSEG.LOSSES.BLPLoss", 0.0, "MODEL.BLPSEG.LOSSES.AnnotationLoss", 0.0], "nothing to train with"),
    ],
)
def test_bad_config(opts, message):
    with pytest.raises(BLPSegError, match=message):
        build_losses(get_cfg("", opts))


@pytest.mark.parametrize(
    ("key", "value", "new"),
    [
        ("SOLVER.FINETUNE_OTHER_CLASSES", True, "MODEL.BLPSEG.RESET_CLASS_LAYERS"),
        ("MODEL.BLPSEG.REGULARIZERS", ["GatedCRF"], "MODEL.BLPSEG.LOSSES"),
        ("MODEL.BLPSEG.DECODER.CHANNELS", 64, "MODEL.SEM_SEG_HEAD.CONVS_DIM"),
    ],
)
def test_keys_of_earlier_versions_are_reported_with_the_new_ones(key, value, new, tmp_path):
    with pytest.raises(BLPSegError, match=f"{key} was renamed to {new}"):
        get_cfg("", [key, value])
    *sections, name = key.split(".")
    (tmp_path / "old.yaml").write_text("".join(f"{'  ' * i}{s}:\n" for i, s in enumerate(sections)) +
                                       f"{'  ' * len(sections)}{name}: {value}\n")  # fmt: skip
    with pytest.raises(BLPSegError, match=f"old.yaml.*{key} was renamed to {new}"):
        get_cfg(str(tmp_path / "old.yaml"))
