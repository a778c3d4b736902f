"""The mean teacher against its formulas, through the model, and across a checkpoint."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from blpseg import get_cfg
from blpseg.modeling.losses import build_losses
from blpseg.modeling.outputs import Outputs, Targets
from blpseg.utils.errors import BLPSegError

from .test_model import sample


@pytest.fixture
def model(tiny_cfg):
    tiny_cfg.MODEL.BLPSEG.DECODER.DROPOUT = 0.0
    tiny_cfg.MODEL.BLPSEG.LOSSES.MeanTeacher = 1.0
    tiny_cfg.MODEL.BLPSEG.MEAN_TEACHER.RAMP_ITERS = 0
    torch.manual_seed(0)
    return build_model(tiny_cfg).train()


BATCH = [sample(64, 64), sample(64, 64, seed=1)]


def step(model, iteration, lr=0.01):
    """One SGD step -> the teacher's loss."""
    with EventStorage(iteration):
        losses = model(BATCH)
    model.zero_grad()
    sum(losses.values()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad.clamp(-1, 1)
    return float(losses["loss_mean_teacher"].detach())


def test_the_teacher_is_a_moving_average_and_has_no_gradient(model):
    student, teacher = model.sem_seg_head.predictor[0].weight, model.losses["loss_mean_teacher"].teacher
    expected = None
    for k in range(4):
        decay = min(0.99, k / (k + 10))
        before = student.detach().clone()
        expected = before if expected is None else decay * expected + (1 - decay) * before
        step(model, k)
        torch.testing.assert_close(teacher[1].predictor[0].weight, expected)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    with EventStorage(3):  # the same step, its second part
        model(BATCH)
    torch.testing.assert_close(teacher[1].predictor[0].weight, expected)


def test_loss_of_a_loop_over_classes_and_cells(model):
    step(model, 0)
    with EventStorage(0):  # the teacher stays
        found = model(BATCH)["loss_mean_teacher"]
        images = model.preprocess_image(BATCH).tensor
        p = model.outputs(images).logits.detach().softmax(dim=1).double()
    backbone, head = model.losses["loss_mean_teacher"].teacher
    with torch.no_grad():
        t = head(backbone(images.flip(-1)), images.flip(-1)).logits.flip(-1).softmax(dim=1).double()
    losses = []
    for i, x in enumerate(BATCH):
        present = x["image_classes"].nonzero()[:, 0].tolist()
        free = F.avg_pool2d((x["scribble"] == 5).double()[None, None], 4)[0, 0]
        total = sum(t[i, c] for c in present)
        area = {c: float((free * t[i, c] / total).sum()) for c in present}
        loss = 0.0
        for row in range(16):
            for column in range(16):
                here = {c: t[i, c, row, column] / total[row, column] for c in present}
                weight = free[row, column] * sum(here[c] / (1 + area[c]) for c in present)
                loss -= weight * sum(here[c] * p[i, c, row, column].log() for c in present)
        losses.append(loss / len(present))
    torch.testing.assert_close(found.detach().double(), sum(losses) / 2, rtol=1e-3, atol=1e-4)


def test_a_student_like_its_teacher_learns_nothing(model, monkeypatch):
    """Else a rare class, which weighs more, would grow with each step of the teacher."""
    loss = model.losses["loss_mean_teacher"]
    target = torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    monkeypatch.setattr(loss, "_targets", lambda *_: target)
    monkeypatch.setattr(loss, "_update", lambda: None)
    logits = target.log().requires_grad_()
    scribble, classes = torch.full((2, 64, 64), 5), torch.ones(2, 5, dtype=torch.bool)
    scribble[:, :8] = 1
    outputs = Outputs(logits, logits[:, :0], logits, logits, None)
    loss(outputs, Targets(scribble, classes, scribble), torch.zeros(2, 3, 64, 64)).backward()
    assert logits.grad.abs().max() < 1e-8


def test_a_run_continues_from_its_state(model, tiny_cfg):
    for k in range(3):
        step(model, k)
    state = copy.deepcopy(model.state_dict())
    expected = [step(model, k) for k in (3, 4)]
    resumed = build_model(tiny_cfg).train()
    resumed.load_state_dict(state)
    assert [step(resumed, k) for k in (3, 4)] == expected


def test_ramp_and_bad_config(tiny_cfg):
    options = ["MODEL.BLPSEG.LOSSES.MeanTeacher", 1.0]
    assert build_losses(get_cfg("", options))["loss_mean_teacher"].ramp_iters == 1000
    with pytest.raises(BLPSegError, match="MEAN_TEACHER.DECAY"):
        build_losses(get_cfg("", [*options, "MODEL.BLPSEG.MEAN_TEACHER.DECAY", 1.0]))
    tiny_cfg.MODEL.BLPSEG.LOSSES.MeanTeacher = 1.0
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    with EventStorage(0):
        assert 0 < float(model(BATCH)["loss_mean_teacher"].detach()) < 0.02
    with torch.no_grad():
        assert model.eval()(BATCH)[0]["sem_seg"].shape == (5, 64, 64)
