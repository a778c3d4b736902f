"""Sampling at pixels against F.interpolate at image size."""

import pytest
import torch
import torch.nn.functional as F

from blpseg.modeling import pixel_sampling
from blpseg.modeling.pixel_sampling import Pixels, PixelSampler, choose_pixels, cross_entropy_at

SIZES = [((6, 5), (24, 20)), ((6, 5), (23, 18)), ((1, 7), (9, 1)), ((8, 8), (8, 8)), ((9, 6), (4, 5))]
SPARSE, DENSE = 0.1, 0.7  # share of supervised pixels, on either side of DENSE_SHARE


def make(grid, size, share=DENSE, dtype=torch.float64, classes=4):
    """Maps (2, C, h, w) and a target (2, H, W) with labels 0..3 and two kinds of what is left out."""
    generator = torch.Generator().manual_seed(0)
    maps = 3 * torch.randn(2, classes, *grid, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 4, (2, *size), generator=generator)
    out = torch.where(torch.rand(2, *size, generator=generator) < 0.5, classes, 255)
    return maps.to(dtype), torch.where(torch.rand(2, *size, generator=generator) < share, label, out)


def at_size(maps, size):
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


@pytest.mark.parametrize("share", [0, SPARSE, DENSE, 1])
@pytest.mark.parametrize("chunk", [1, 30, 1 << 14])
def test_every_wanted_pixel_comes_once(share, chunk, monkeypatch):
    monkeypatch.setattr(pixel_sampling, "CHUNK_PIXELS", chunk)
    wanted = torch.rand(3, 11, 10, generator=torch.Generator().manual_seed(1)) < share
    seen = torch.cat([torch.empty(0, dtype=torch.long), *(p.indices for p in choose_pixels(wanted))])
    assert (seen.diff() > 0).all()
    assert seen[wanted.flatten()[seen]].tolist() == torch.nonzero(wanted.flatten())[:, 0].tolist()
    if share <= SPARSE:
        assert wanted.flatten()[seen].all()
    assert all(len(p.indices) <= max(chunk, 10) for p in choose_pixels(wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("grid,size", SIZES)
def test_samples_are_those_of_interpolate(grid, size, dtype):
    maps, _ = make(grid, size, dtype=dtype)
    sampler, (height, width) = PixelSampler(maps, size), size
    expected = at_size(maps.to(torch.promote_types(dtype, torch.float32)), size).log_softmax(1)
    some = torch.arange(1, len(expected), 3)
    found = sampler.log_softmax(Pixels(some))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected[some])
    rows = slice(height // 3, height)
    strip = torch.arange((height + rows.start) * width, 2 * height * width)
    torch.testing.assert_close(sampler.log_softmax(Pixels(strip, 1, rows)), expected[strip])


@pytest.mark.parametrize("grid,size", SIZES)
@pytest.mark.parametrize("chunk", [7, 1 << 14])
@pytest.mark.parametrize("share", [SPARSE, DENSE])
def test_cross_entropy_and_gradient(grid, size, chunk, share, monkeypatch):
    monkeypatch.setattr(pixel_sampling, "CHUNK_PIXELS", chunk)
    maps, target = make(grid, size, share)
    class_weight = torch.tensor([1, 0.5, 0, 3], dtype=torch.float64)

    def plain(x):
        weighted = torch.where(target < 4, target, -100).flatten(1)
        logits = at_size(x, size).view(2, -1, 4).transpose(1, 2)
        return F.cross_entropy(logits, weighted, class_weight, reduction="none").sum(1)

    x, y = (maps.clone().requires_grad_() for _ in range(2))
    loss, total = cross_entropy_at(x, target, lambda log_p, label, pixels: class_weight[label])
    expected = plain(y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(total.sum(), class_weight[target[target < 4]].sum())
    # Images that weigh differently in what follows.
    scale = torch.tensor([1.0, -3.0], dtype=torch.float64)
    (loss * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("share", [SPARSE, DENSE])
def test_weights_are_computed_from_the_log_probability_and_count_as_constant(share):
    grid, size = SIZES[1]
    maps, target = make(grid, size, share, torch.float32)
    maps.requires_grad_()
    supervised = torch.nonzero((target < 4).flatten())[:, 0]
    seen = torch.full((target.numel(),), float("nan"))

    def weigh(log_p, label, pixels):
        seen[pixels.indices] = log_p[:, 0]
        return log_p.exp()

    loss, total = cross_entropy_at(maps, target, weigh)
    log_p = at_size(maps, size).log_softmax(1)[supervised].gather(1, target.flatten()[supervised, None])[:, 0]
    torch.testing.assert_close(seen[supervised], log_p.detach())
    expected = -(log_p.detach().exp() * log_p).sum()
    torch.testing.assert_close(loss.sum().float(), expected)
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, maps)[0], rtol=1e-4, atol=1e-5)
    assert not total.requires_grad


def test_no_pixels():
    maps, target = make(*SIZES[0], share=0)
    maps.requires_grad_()
    loss, total = cross_entropy_at(maps, target, lambda log_p, label, pixels: torch.ones_like(log_p))
    loss.sum().backward()
    assert loss.tolist() == total.tolist() == [0, 0] and not maps.grad.any()
