"""The annotation head that learns place: its formula, its gradients, and what it learns of a stroke in the middle."""

import numpy as np
import torch
from detectron2.modeling import build_model

from blpseg.modeling.annotation_head import PlaceHead, _distances
from blpseg.modeling.losses import annotation_loss

from .test_model import touched, two_sizes


def test_distances_of_every_pair_of_cells():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 9, generator=generator)
    logits[1] = 0
    logits[1, 2] = 1  # one segment: no boundary
    label, found = logits.argmax(dim=1).numpy(), _distances(logits).expm1().numpy()
    expected = np.full((2, 6, 9), 64.0)
    for n, y, x in np.ndindex(*label.shape):
        for r, c in np.ndindex(6, 9):
            if label[n, r, c] != label[n, y, x]:
                expected[n, y, x] = min(expected[n, y, x], np.hypot(r - y, c - x))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    for n, y, x in np.ndindex(*label.shape):
        around = expected[n, max(0, y - 4) : y + 5, max(0, x - 4) : x + 5]
        np.testing.assert_allclose(found[n, 1, y, x], around.max(), rtol=1e-4)


def test_probability_is_place_times_class(tiny_cfg):
    tiny_cfg.MODEL.BLPSEG.ANNOTATION.PLACE = True
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    batch = two_sizes()
    losses = model(batch)
    assert set(losses) == {"loss_seg", "loss_annotation"}
    losses["loss_annotation"].backward(retain_graph=True)
    assert touched(model) == {"annotation_head"}
    torch.nn.init.normal_(model.sem_seg_head.annotation_head.place.weight)
    with torch.no_grad():
        outputs = model.eval().outputs(model.preprocess_image(batch).tensor)
    q, p = outputs.annotation_logits.softmax(dim=1), outputs.logits.softmax(dim=1)
    torch.testing.assert_close(q[:, :-1], (1 - q[:, -1:]) * p, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(outputs.annotation_logits.exp().sum(dim=1), torch.ones_like(q[:, 0]))
    assert q[:, -1].std() > 0


def test_it_learns_that_strokes_keep_away_from_boundaries():
    torch.manual_seed(0)
    head = PlaceHead(8, patch_size=4)
    logits = torch.zeros(1, 2, 16, 32)
    logits[:, 1, :, 16:] = 8.0  # two segments, the boundary at column 16 of the grid
    logits[:, 0, :, :16] = 8.0
    scribble = torch.full((1, 64, 128), 2)
    scribble[:, 8:56, 28:32], scribble[:, 8:56, 96:100] = 0, 1  # 32 pixels from it
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    images = torch.randn(1, 3, 64, 128)
    for _ in range(60):
        optimizer.zero_grad()
        annotation_loss(head(images, logits), scribble, 0.05).backward()
        optimizer.step()
    with torch.no_grad():
        place = 1 - head(images, logits).softmax(dim=1)[0, -1]
    drawn, rim = place[:, [7, 24]].mean(), place[:, 14:18].mean()
    assert drawn > 2 * rim
