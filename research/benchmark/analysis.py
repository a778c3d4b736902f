"""Where a model's parameters, operations, memory and time are."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from functools import partial

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter
from torch import nn

from blpseg.modeling import BLPSeg, LocalAggregation, Targets, local_aggregation

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
        name: of the module, or "losses".
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
    result: list[Part] = []
    for name, numbers in measured.items():
        module, inputs = traced.get(name, (None, None))
        operations = None
        if module is not None:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # the tracer's, on shapes that become numbers
                plain = _Aggregation(module.sigma) if isinstance(module, LocalAggregation) else module
                operations = count_operations(plain, inputs).total()
        # Those of local aggregation are its embedding's, which is a part of its own.
        counted = module is not None and name != "local_aggregation"
        parameters = sum(p.numel() for p in module.parameters()) if counted else 0
        result.append(Part(name, parameters, operations, *numbers))
    return result


def _run(model: BLPSeg, image: torch.Tensor) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """A forward with gradient, part by part.

    Evaluation mode: batch statistics of one image leave the 1 x 1 pooling nothing, and cost next to nothing.

    Returns:
        name -> (output, kept, peak, seconds); name -> (module, its inputs).
    """
    x = model.preprocess_image([{"image": image[0]}]).tensor
    height, width = x.shape[-2:]
    parameters = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: set[int] = set(parameters)
    alive: list[torch.Tensor] = []
    parts: dict[str, tuple] = {}
    traced: dict[str, tuple] = {}

    def measure(name, run, module, *inputs):
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
                result.append(run(*inputs))

        if image.is_cuda:
            run(*inputs)  # libraries and kernels load at their first use
        start = time.perf_counter()
        peak = peak_memory(forward, image.device.type)
        seconds = time.perf_counter() - start
        outputs = result[0]
        tensors = outputs.values() if isinstance(outputs, dict) else [outputs]
        parts[name] = sum(t.numel() * t.element_size() for t in tensors), kept, peak, seconds
        if module is not None:
            traced[name] = module, inputs
        return outputs

    named = {"backbone": model.backbone, **dict(model.sem_seg_head.named_children())}
    if model.local_aggregation is not None:
        named["embedding"] = model.local_aggregation.embedding
    for name, module in named.items():
        module.forward = partial(measure, name, module.forward, module)
    try:
        outputs = model.outputs(x)
    finally:
        for module in named.values():
            del module.forward
    scribble = torch.full((1, height, width), model.num_classes, device=image.device)
    scribble[:, height // 2 - 1 : height // 2 + 2] = 0
    targets = Targets(scribble, torch.ones(1, model.num_classes, dtype=torch.bool), scribble)
    measure("losses", lambda: sum(model.compute_losses(outputs, targets, x).values()), None)
    return parts, traced
