"""Where a model's parameters, operations, memory and time are."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter
from torch import nn

from blpseg.modeling import BLPSeg, local_aggregation
from blpseg.modeling.losses import annotation_loss

from .measure import peak_memory

__all__ = ["Part", "analyze", "count_operations"]

# What fvcore leaves out of local aggregation; a softmax is a subtraction, an exponential, a sum and a division.
_HANDLERS = {
    "aten::softmax": elementwise_flop_counter(0, 4),
    **{f"aten::{name}": elementwise_flop_counter(0, 1) for name in ("mul", "div", "add", "sub", "exp")},
    "aten::sum": elementwise_flop_counter(1, 0),
}


@dataclass(frozen=True)
class Part:
    """One part of the network.

    Attributes:
        name: of the module, "local_aggregation" or "losses".
        parameters: how many.
        operations: multiply-adds of a forward, as fvcore counts; None for the losses.
        output: bytes of what it returns.
        kept: bytes it keeps for the gradient, beyond parameters and what an earlier part keeps already.
        peak: bytes it takes at its peak in a forward with gradient.
        seconds: of that forward.
    """

    name: str
    parameters: int
    operations: float | None
    output: int
    kept: int
    peak: int
    seconds: float


class _Aggregation(nn.Module):
    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = sigma

    def forward(self, logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return local_aggregation(logits, features, self.sigma, impl="dense")


def count_operations(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> FlopCountAnalysis:
    """fvcore's count of a module, a multiply-add as one; the softmax and products of local aggregation are included."""
    counter = FlopCountAnalysis(module, inputs).set_op_handle(**_HANDLERS)
    return counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


def analyze(model: BLPSeg, height: int, width: int) -> list[Part]:
    """Parts of a model on one image, in the order in which they run.

    Args:
        model: of any config; put into evaluation mode.
        height, width: of the image.

    Returns:
        the parts. Operations of local aggregation are those of the dense formula, which is what is defined; the exact
        tiles do half of its products of features.
    """
    image = 255 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(model.device)
    measured, traced = _run(model.eval(), image)
    result = []
    for name, numbers in measured.items():
        module, inputs = traced.get(name, (None, None))
        operations = None
        if module is not None:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # the tracer's, on shapes that become numbers
                operations = count_operations(module, inputs).total()
        parameters = 0 if module is None else sum(p.numel() for p in module.parameters())
        result.append(Part(name, parameters, operations, *numbers))
    return result


def _normalized(model: BLPSeg, image: torch.Tensor) -> torch.Tensor:
    return model._preprocess([{"image": image[0]}]).tensor


def _run(model: BLPSeg, image: torch.Tensor) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """A forward with gradient, part by part.

    Evaluation mode: batch statistics of one image leave the 1 x 1 pooling nothing, and cost next to nothing.

    Returns:
        name -> (output, kept, peak, seconds); name -> (module, its inputs).
    """
    x = _normalized(model, image)
    height, width = x.shape[-2:]
    parameters = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: set[int] = set(parameters)
    alive: list[torch.Tensor] = []
    parts: dict[str, tuple] = {}
    traced: dict[str, tuple] = {}

    def measure(name, run, module=None, *inputs):
        kept = 0
        result = []

        def keep(tensor):
            nonlocal kept
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                alive.append(tensor)  # so that no later tensor takes its place in memory
                kept += storage.nbytes()
            return tensor

        def forward():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result.append(run())

        if image.is_cuda:
            run()  # libraries and kernels load at their first use
        start = time.perf_counter()
        peak = peak_memory(forward, image.device.type)
        seconds = time.perf_counter() - start
        outputs = result[0]
        tensors = outputs.values() if isinstance(outputs, dict) else [outputs]
        parts[name] = sum(t.numel() * t.element_size() for t in tensors), kept, peak, seconds
        if module is not None:
            traced[name] = module, inputs
        return outputs

    def call(name, *inputs):
        module = getattr(model, name)
        return measure(name, lambda: module(*inputs), module, *inputs)

    features = call("backbone", x)
    decoded = call("pixel_decoder", features)
    logits = call("sem_seg_head", decoded)
    if model.embedding is not None:
        embedded = call("embedding", x)
        given = {"sigma": model.lam_sigma, "impl": model.lam_impl, "window": model.lam_window}
        raw = logits
        logits = measure(
            "local_aggregation",
            lambda: local_aggregation(raw, embedded, **given),
            _Aggregation(model.lam_sigma), raw, embedded,
        )  # fmt: skip
    annotation = call("annotation_head", decoded.detach())
    scribble = torch.full((1, height, width), model.num_classes, device=image.device)
    scribble[:, height // 2 - 1 : height // 2 + 2] = 0

    def losses():
        segmentation, _ = model.segmentation_loss(logits, annotation, scribble, x)
        return segmentation + annotation_loss(annotation, scribble, model.unannotated_weight)

    measure("losses", losses)
    return parts, traced
