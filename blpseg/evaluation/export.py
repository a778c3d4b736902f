"""Export of a model for other runtimes: TorchScript and ONNX, for images of any height and width."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..modeling import BLPSeg
from ..modeling.outputs import upsample
from ..utils.errors import BLPSegError
from ..utils.files import write_bytes_atomic

EXAMPLE_SIZE = (96, 128)  # of the image that is traced; the graph does not depend on it
# Sizes that no stride divides, one larger and one smaller than the example.
VERIFIED_SIZES = ((117, 150), (70, 61))
TOLERANCE = 1e-3  # relative to the largest logit, where that is above 1


class InferenceGraph(nn.Module):
    """The computation of a BLPSeg model at inference, from tensor to tensor: one view, local aggregation included."""

    def __init__(self, model: BLPSeg):
        """
        Args:
            model: in evaluation mode.

        Raises:
            BLPSegError: the model aggregates in a window, which exists only as a loop over tiles.
        """
        super().__init__()
        if model.local_aggregation is not None and model.local_aggregation.impl == "window":
            raise BLPSegError("MODEL.BLPSEG.LAM.IMPL window cannot be exported; the exact aggregation can (auto)")
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(1, 3, H, W) float32 in 0..255, channels as INPUT.FORMAT -> (1, C, H, W) float32 logits, as the model's."""
        images = self.model.preprocess_image([{"image": image[0]}]).tensor
        logits = upsample(self.model.outputs(images, annotation=False).logits, images.shape[-2:])
        return logits[..., : image.shape[-2], : image.shape[-1]]


class _ExplicitPooling(TorchFunctionMode):
    """Adaptive pooling as two matrix products: ONNX has no such operator for sizes that are not known yet."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.adaptive_avg_pool2d:
            x, bins = args
            return _pooling_matrix(x.shape[-2], bins, x) @ x @ _pooling_matrix(x.shape[-1], bins, x).T
        return func(*args, **(kwargs or {}))


def _pooling_matrix(length, bins: int, like: torch.Tensor) -> torch.Tensor:
    """(bins, length): row i averages positions floor(i L / bins) .. ceil((i + 1) L / bins) - 1, as torch does."""
    i = torch.arange(bins, device=like.device)[:, None]
    start, stop = (i * length) // bins, ((i + 1) * length + bins - 1) // bins
    position = torch.arange(length, device=like.device)
    inside = ((position >= start) & (position < stop)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def _export_torchscript(graph: InferenceGraph, example: torch.Tensor, metadata: dict[str, str]) -> bytes:
    with warnings.catch_warnings():
        # The tracer warns of every shape that becomes a number; the verification shows that none that matters does.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph, example, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={f"{key}.txt": value for key, value in metadata.items()})
    return buffer.getvalue()


def _export_onnx(graph: InferenceGraph, example: torch.Tensor, metadata: dict[str, str]) -> bytes:
    try:
        import onnx
    except ImportError as error:
        raise BLPSegError(f"ONNX needs onnx ({error}): pip install 'blpseg[export]'") from error
    buffer = io.BytesIO()
    size = {2: "height", 3: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes that become numbers, as above, and that this exporter is the older one
        # The newer one (dynamo=True) calculates with formulas of every size: minutes for an EfficientNet, here seconds.
        torch.onnx.export(
            graph,
            (example,),
            buffer,
            dynamo=False,
            opset_version=18,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": size, "logits": size},
        )
    proto = onnx.load_from_string(buffer.getvalue())
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


# File name's ending -> (graph, example, metadata) -> the file's content.
EXPORTERS = {".onnx": _export_onnx, ".ts": _export_torchscript, ".pt": _export_torchscript}


def export(model: BLPSeg, path: str, *, class_names: Sequence[str] = (), image_format: str = "RGB") -> float:
    """Write a model for another runtime and compare it with the original.

    The graph is :class:`InferenceGraph` with open height and width; ``classes`` (a JSON list) and
    ``image_format`` are stored in the file (ONNX: metadata_props; TorchScript: extra files). Memory of
    the exported local aggregation grows with (H W / 16)^2: 0.6 GB a table for a 500 x 375 image.

    Args:
        model: any device; it is exported on the CPU, and moved back.
        path: ends in ``.onnx``, ``.ts`` or ``.pt`` (TorchScript).
        class_names: C names.
        image_format: INPUT.FORMAT of the config.

    Returns:
        the largest difference of a logit from eager execution over ``VERIFIED_SIZES``.

    Raises:
        BLPSegError: an unknown ending, a missing package, or the file does not compute what the model does
            (nothing is written then).
    """
    kind = os.path.splitext(path)[1]
    if kind not in EXPORTERS:
        raise BLPSegError(f"{path}: unknown ending; exported models end in {', '.join(EXPORTERS)}")
    metadata = {"classes": json.dumps(list(class_names)), "image_format": image_format}
    device, training = model.device, model.training
    generator = torch.Generator().manual_seed(0)
    try:
        graph = InferenceGraph(model.eval().cpu()).eval()  # which exporters set back to what it was
        with torch.no_grad():
            with _ExplicitPooling():
                content = EXPORTERS[kind](graph, _image(EXAMPLE_SIZE, generator), metadata)
            run = _runner(kind, content)
            worst = 0.0
            for size in VERIFIED_SIZES:
                image = _image(size, generator)
                expected = model([{"image": image[0]}])[0]["sem_seg"]
                difference = float(np.abs(run(image.numpy())[0] - expected.numpy()).max())
                if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                    raise BLPSegError(
                        f"{path}: not written, its logits differ from the model's by {difference:.2g} at {size}"
                    )
                worst = max(worst, difference)
    finally:
        model.to(device).train(training)
    write_bytes_atomic(path, content)
    return worst


def _runner(kind: str, content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    if kind == ".onnx":
        try:
            import onnxruntime
        except ImportError as error:
            raise BLPSegError(f"ONNX is verified with onnxruntime ({error}): pip install 'blpseg[export]'") from error
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {"image": image})[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.load(io.BytesIO(content), map_location="cpu")
    return lambda image: script(torch.from_numpy(image)).detach().numpy()


def _image(size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(1, 3, *size, generator=generator) * 255
