"""Sampling at pixels against F.interpolate at image size."""

import pytest
import torch
import torch.nn.functional as F

from blpseg.modeling import pixel_sampling
from blpseg.modeling.pixel_sampling import PixelSampler, cross_entropy_at

SIZES = [((6, 5), (24, 20)), ((6, 5), (23, 18)), ((1, 7), (9, 1)), ((8, 8), (8, 8)), ((9, 6), (4, 5))]


def make(grid, size, dtype=torch.float32, classes=4):
    generator = torch.Generator().manual_seed(0)
    maps = 3 * torch.randn(2, classes, *grid, generator=generator, dtype=torch.float64)
    pixels = torch.nonzero(torch.rand(2 * size[0] * size[1], generator=generator) < 0.6)[:, 0]
    return maps.to(dtype), pixels


def at_size(maps, size):
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


@pytest.mark.parametrize("grid,size", SIZES)
def test_samples_are_those_of_interpolate(grid, size):
    maps, pixels = make(grid, size)
    torch.testing.assert_close(PixelSampler(maps, size)(pixels), at_size(maps, size)[pixels])


def test_half_precision_is_raised():
    maps, pixels = make(*SIZES[0], dtype=torch.float16)
    samples = PixelSampler(maps, SIZES[0][1])(pixels)
    assert samples.dtype == torch.float32
    torch.testing.assert_close(samples, at_size(maps.float(), SIZES[0][1])[pixels])


@pytest.mark.parametrize("grid,size", SIZES)
@pytest.mark.parametrize("chunk", [7, 1 << 15])
def test_cross_entropy_and_gradient(grid, size, chunk, monkeypatch):
    monkeypatch.setattr(pixel_sampling, "CHUNK_PIXELS", chunk)
    maps, pixels = make(grid, size, torch.float64)
    label = pixels % 4
    pixel_weight = (pixels % 5).double()[:, None]

    def ours(x):
        return cross_entropy_at(x, pixels, label, size, lambda _, chunk: pixel_weight[chunk])

    def plain(x):
        loss = F.cross_entropy(at_size(x, size)[pixels], label, reduction="none") * pixel_weight[:, 0]
        image = pixels // (size[0] * size[1])
        return torch.stack([loss[image == i].sum() for i in range(2)])

    x, y = (maps.clone().requires_grad_() for _ in range(2))
    loss, total = ours(x)
    expected = plain(y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(total.sum(), pixel_weight.sum())
    # Images that weigh differently in what follows.
    scale = torch.tensor([1.0, -3.0], dtype=torch.float64)
    (loss * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_weights_are_computed_from_the_log_probability_and_count_as_constant():
    maps, pixels = make(*SIZES[1])
    label = pixels % 4
    maps.requires_grad_()
    seen = []

    def weigh(log_p, chunk):
        seen.append(log_p[:, 0])
        return log_p.exp()

    loss, total = cross_entropy_at(maps, pixels, label, SIZES[1][1], weigh)
    log_p = at_size(maps, SIZES[1][1]).log_softmax(1)[pixels].gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(torch.cat(seen), log_p)
    expected = -(log_p.detach().exp() * log_p).sum()
    torch.testing.assert_close(loss.sum().float(), expected)
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, maps)[0], rtol=1e-4, atol=1e-5)
    assert not total.requires_grad


def test_no_pixels():
    maps, _ = make(*SIZES[0])
    maps.requires_grad_()
    none = torch.empty(0, dtype=torch.long)
    loss, total = cross_entropy_at(maps, none, none, SIZES[0][1], lambda log_p, _: torch.ones_like(log_p))
    loss.sum().backward()
    assert loss.tolist() == total.tolist() == [0, 0] and not maps.grad.any()
