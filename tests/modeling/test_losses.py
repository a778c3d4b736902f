"""Losses and pseudo labels against loops over pixels, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from blpseg.modeling import annotation_loss, blp_loss, pseudo_labels

CLASSES = 4


def random_case(seed, n=2, grid=(5, 7), size=(18, 27), annotated=0.1, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, CLASSES, *grid, generator=g)
    annotation = scale * torch.randn(n, CLASSES + 1, *grid, generator=g)
    label = torch.randint(CLASSES, (n, *size), generator=g)
    scribble = torch.where(torch.rand(n, *size, generator=g) < annotated, label, CLASSES)
    scribble[:, :, -3:] = 255
    return logits, annotation, scribble


def full_size(x, size):
    return F.interpolate(x.double(), size=size, mode="bilinear", align_corners=False)


def loop_blp(logits, annotation, target, gamma):
    """METHOD section 4, a pixel at a time. The weight is computed from detached numbers."""
    size = target.shape[1:]
    s, a = full_size(logits, size), full_size(annotation, size)
    images = []
    for i in range(len(s)):
        top, bottom = s.new_zeros(()), s.new_zeros(())
        for r in range(size[0]):
            for c in range(size[1]):
                y = int(target[i, r, c])
                if y < CLASSES:
                    log_p = s[i, y, r, c] - torch.logsumexp(s[i, :, r, c], 0)
                    p = math.exp(float(log_p.detach()))
                    q = float(torch.softmax(a[i, :, r, c], 0)[y])
                    weight = (1 - q * p) ** gamma
                    top, bottom = top - weight * log_p, bottom + weight
        images.append(top / (bottom + 1e-7))
    return sum(images) / len(images)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("annotated", [0.05, 1.0])
def test_blp_loss_and_gradient(gamma, annotated):
    logits, annotation, scribble = random_case(0, annotated=annotated)
    logits.requires_grad_(True)
    annotation.requires_grad_(True)
    loss, mean_weight, count = blp_loss(logits, annotation, scribble, gamma)
    (gradient,) = torch.autograd.grad(loss, logits)
    reference = logits.detach().clone().requires_grad_(True)
    expected = loop_blp(reference, annotation.detach(), scribble, gamma)
    (expected_gradient,) = torch.autograd.grad(expected, reference)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert int(count) == int((scribble < CLASSES).sum())
    assert 0 < float(mean_weight) <= 1 and (gamma > 0 or float(mean_weight) == 1)


def test_no_gradient_reaches_the_annotation_head_through_the_weight():
    logits, annotation, scribble = random_case(1)
    logits.requires_grad_(True)
    annotation.requires_grad_(True)
    blp_loss(logits, annotation, scribble, 2.0)[0].backward()
    assert annotation.grad is None or not annotation.grad.any()


def test_gamma_0_is_the_mean_of_partial_cross_entropies():
    logits, annotation, scribble = random_case(2)
    at_size = full_size(logits, scribble.shape[1:])
    target = torch.where(scribble < CLASSES, scribble, 255)
    expected = torch.stack(
        [F.cross_entropy(x[None], t[None], ignore_index=255) for x, t in zip(at_size, target, strict=True)]
    ).mean()
    loss = blp_loss(logits, annotation, scribble, 0.0)[0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_confident_and_expected_pixel_weighs_nothing_and_an_unexpected_one_everything():
    # One pixel a cell. p -> 1 and q -> 1 at column 0; p -> 1 and q -> 0 at column 1.
    logits = torch.zeros(1, CLASSES, 1, 2)
    logits[0, 1] = 40.0
    annotation = torch.zeros(1, CLASSES + 1, 1, 2)
    annotation[0, 1, 0, 0] = 40.0
    annotation[0, CLASSES, 0, 1] = 40.0
    for column, weight in ((0, 0.0), (1, 1.0)):
        target = torch.full((1, 1, 2), 255)
        target[0, 0, column] = 1
        assert float(blp_loss(logits, annotation, target, 2.0)[1]) == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize("loss_of", ["blp", "annotation"])
def test_images_without_annotation_or_of_padding_alone(loss_of):
    logits, annotation, scribble = random_case(3)
    for value in (CLASSES, 255):
        scribble[:] = value
        x = (logits if loss_of == "blp" else annotation).clone().requires_grad_(True)
        loss = blp_loss(x, annotation, scribble, 2.0)[0] if loss_of == "blp" else annotation_loss(x, scribble, 0.02)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
        if loss_of == "blp" or value == 255:
            assert float(loss) == 0 and not x.grad.any()


@pytest.mark.parametrize("unannotated_weight", [0.02, 1.0])
def test_annotation_loss(unannotated_weight):
    _, annotation, scribble = random_case(4)
    annotation.requires_grad_(True)
    loss = annotation_loss(annotation, scribble, unannotated_weight)
    (gradient,) = torch.autograd.grad(loss, annotation)
    reference = annotation.detach().clone().requires_grad_(True)
    at_size = full_size(reference, scribble.shape[1:])
    top, bottom = 0, 0
    for i, r, c in (scribble != 255).nonzero().tolist():
        y = int(scribble[i, r, c])
        weight = unannotated_weight if y == CLASSES else 1.0
        top = top + weight * (torch.logsumexp(at_size[i, :, r, c], 0) - at_size[i, y, r, c])
        bottom += weight
    (expected_gradient,) = torch.autograd.grad(top / bottom, reference)
    torch.testing.assert_close(loss.double(), top / bottom, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_pseudo_labels(threshold):
    logits, _, scribble = random_case(5)
    image_classes = torch.tensor([[True, False, True, True], [True, True, False, False]])
    found = pseudo_labels(logits, scribble, image_classes, threshold)
    p = full_size(logits, scribble.shape[1:]).softmax(1)
    seen = set()
    for i in range(2):
        for r in range(scribble.shape[1]):
            for c in range(scribble.shape[2]):
                y = int(scribble[i, r, c])
                values = [float(p[i, k, r, c]) * bool(image_classes[i, k]) for k in range(CLASSES)]
                best = max(range(CLASSES), key=values.__getitem__)
                if y == 255:
                    expected = 255
                elif y < CLASSES:
                    expected = y
                else:
                    expected = best if values[best] >= threshold else 255
                assert int(found[i, r, c]) == expected
                seen.add((y == CLASSES, expected == 255))
    assert seen >= {(True, True), (True, False), (False, False)}


def test_pseudo_labels_name_no_class_that_the_image_does_not_have():
    logits, _, scribble = random_case(6)
    scribble[:] = CLASSES
    image_classes = torch.tensor([[True, False, False, False]]).repeat(2, 1)
    assert set(pseudo_labels(logits, scribble, image_classes, 0.0).unique().tolist()) == {0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_of_hundreds_stay_finite(dtype):
    logits, annotation, scribble = random_case(7, scale=200.0)
    low = logits.to(dtype).requires_grad_(True)
    low_annotation = annotation.to(dtype).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = blp_loss(low, low_annotation, scribble, 2.0)[0] + annotation_loss(low_annotation, scribble, 0.02)
    loss.backward()
    assert loss.dtype == torch.float32
    for x in (loss, low.grad, low_annotation.grad):
        assert torch.isfinite(x).all()
    # The arithmetic is float32: only the rounding of the input differs.
    exact = blp_loss(low.float(), low_annotation.float(), scribble, 2.0)[0]
    exact = exact + annotation_loss(low_annotation.float(), scribble, 0.02)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)
