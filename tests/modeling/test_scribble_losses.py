"""Partial Dice, tree energy and soft self-labelling against loops, in float64, and through the model."""

import math

import pytest
import torch
from detectron2.modeling import build_model

from blpseg.modeling.losses import PartialDice, SoftSelfLabelling, TreeEnergy
from blpseg.modeling.outputs import Outputs, Targets

from .test_label_free_losses import STD, cell_pixels, cells_of, random_case, squared
from .test_losses import CLASSES, full_size
from .test_model import sample


def make(name, steps=4):
    if name == "PartialDice":
        return PartialDice()
    if name == "TreeEnergy":
        return TreeEnergy(sigma=1.5)
    return SoftSelfLabelling(potts_weight=0.7, sigma_rgb=0.2, steps=steps, step_size=0.3, pixel_std=STD)


def call(loss, logits, images, scribble, features=None):
    return loss(Outputs(logits, None, features, None, None), Targets(scribble, None, scribble), images)


def loop_dice(logits, images, scribble, features):
    p = full_size(logits, scribble.shape[1:]).softmax(1)
    scores = []
    for c in range(CLASSES):
        top, bottom, present = 0, 0, 0
        for i, y, x in (scribble < CLASSES).nonzero().tolist():
            label = int(int(scribble[i, y, x]) == c)
            top, bottom, present = top + p[i, c, y, x] * label, bottom + p[i, c, y, x] + label, present + label
        if present:
            scores.append(1 - 2 * top / bottom)
    return sum(scores) / len(scores)


def spanning_tree(cells, length):
    """Kruskal's: {cell: [(neighbour, length)]} of the minimum spanning tree of the 4-connected cells."""
    edges = [(length(a, b), a, b) for a in cells for b in ((a[0], a[1] + 1), (a[0] + 1, a[1])) if b in cells]
    group, tree = {a: a for a in cells}, {a: [] for a in cells}
    for gap, a, b in sorted(edges):
        if group[a] != group[b]:
            joined = group[b]
            group = {k: group[a] if v == joined else v for k, v in group.items()}
            tree[a].append((b, gap))
            tree[b].append((a, gap))
    return tree


def dense_filter(values, features):
    """F(D, p) with D of every pair, walked along the tree; {cell: value}, {cell: feature vector} -> {cell: value}."""
    tree = spanning_tree(features, lambda a, b: float(sum((features[a] - features[b]) ** 2)))
    out = {}
    for start in tree:
        distance, stack = {start: 0.0}, [start]
        while stack:
            at = stack.pop()
            for neighbour, gap in tree[at]:
                if neighbour not in distance:
                    distance[neighbour] = distance[at] + gap
                    stack.append(neighbour)
        total = sum(math.exp(-d) for d in distance.values())
        out[start] = sum(math.exp(-d) * values[b] for b, d in distance.items()) / total
    return out


def loop_tree(logits, images, scribble, features, sigma=1.5):
    losses = []
    for s, x, y, f in zip(logits, images, scribble, features, strict=True):
        cells = cells_of(s, x, y)
        p = {a: v for a, v, _ in cells}
        scale = torch.tensor(STD, dtype=s.dtype) * sigma**0.5
        colors = {a: torch.tensor(color, dtype=s.dtype) / scale for a, _, color in cells}
        label = dense_filter(dense_filter(p, colors), {a: f[:, a[0], a[1]] for a in p})
        top, bottom = 0, 0
        for a, pixels in cell_pixels(y.shape, s.shape[1:]).items():
            share = sum(int(y[r, c]) == CLASSES for r, c in pixels) / len(pixels)
            if share:
                top, bottom = top + share * (p[a] - label[a]).abs().sum(), bottom + share
        losses.append(top / bottom)
    return sum(losses) / len(losses)


def loop_soft(logits, images, scribble, features, weight=0.7, sigma=0.2, steps=4, step_size=0.3):
    losses = []
    for s, x, y in zip(logits, images, scribble, strict=True):
        cells = {a: (p, color) for a, p, color in cells_of(s, x, y)}
        seeds = {}
        for r, c in (y < CLASSES).nonzero().tolist():
            a = (r * s.shape[1] // y.shape[0], c * s.shape[2] // y.shape[1])
            seeds.setdefault(a, torch.zeros(CLASSES, dtype=s.dtype))[int(y[r, c])] += 1
        fixed = {a: (v / v.sum()).clamp(min=torch.finfo(v.dtype).eps) for a, v in seeds.items()}
        p = {a: v.detach() for a, (v, _) in cells.items()}
        u = {a: v.log() for a, v in p.items() if a not in seeds}
        for _ in range(steps):
            u = {a: v.detach().requires_grad_(True) for a, v in u.items()}
            label = {a: u[a].softmax(0) if a in u else fixed[a] for a in cells}
            energy = -sum(torch.log(label[a] @ p[a]) for a in u)
            for a in cells:
                for b in ((a[0], a[1] + 1), (a[0] + 1, a[1])):
                    if b in cells:
                        alike = math.exp(-squared(cells[a][1], cells[b][1]) / 255**2 / (2 * sigma**2))
                        cosine = label[a] @ label[b] / (label[a].norm() * label[b].norm())
                        energy = energy - weight * alike * torch.log(cosine)
            gradients = torch.autograd.grad(energy, list(u.values()))
            u = {a: v - step_size * g for (a, v), g in zip(u.items(), gradients, strict=True)}
        losses.append(-sum(torch.log(u[a].detach().softmax(0) @ cells[a][0]) for a in u) / len(u))
    return sum(losses) / len(losses)


LOOPS = {"PartialDice": loop_dice, "TreeEnergy": loop_tree, "SoftSelfLabelling": loop_soft}


@pytest.mark.parametrize("name", LOOPS)
def test_value_and_gradient(name):
    logits, images, scribble = random_case(0, annotated=0.02)
    features = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits, reference = (logits.clone().requires_grad_(True) for _ in range(2))
    loss, expected = (
        call(make(name), logits, images, scribble, features),
        LOOPS[name](reference, images, scribble, features),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    (found,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(expected, reference)
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", LOOPS)
def test_images_without_annotation_and_of_padding_alone(name):
    logits, images, scribble = random_case(3)
    features = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    for value in (CLASSES, 255):
        scribble[:] = value
        x = logits.clone().requires_grad_(True)
        loss = call(make(name), x, images, scribble, features)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
        if value == 255 or name == "PartialDice":
            assert float(loss.detach()) == 0


def test_soft_pseudo_labels_lower_their_energy_and_smooth_a_flat_image():
    logits, images, scribble = random_case(4, annotated=0.02)
    images[:] = 0
    few, many = (float(call(make("SoftSelfLabelling", steps=k), logits, images, scribble)) for k in (1, 30))
    assert many > few  # the labels leave the noisy predictions for their neighbours


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", LOOPS)
def test_lower_precision(name, dtype):
    logits, images, scribble = random_case(5, annotated=0.02)
    features = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low = logits.to(dtype).requires_grad_(True)
    loss = call(make(name), low, images.float(), scribble, features.to(dtype))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(low.grad).all()
    exact = call(make(name), low.detach().double(), images, scribble, features.to(dtype).double())
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-3, atol=1e-5)


def test_through_the_model(tiny_cfg):
    names = {"PartialDice": "loss_partial_dice", "TreeEnergy": "loss_tree_energy"}
    names["SoftSelfLabelling"] = "loss_soft_self_labelling"
    for name in names:
        tiny_cfg.MODEL.BLPSEG.LOSSES[name] = 0.5
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    losses = model([sample(64, 64), sample(40, 47, seed=1)])
    assert set(losses) == {"loss_seg", "loss_annotation", *names.values()}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
