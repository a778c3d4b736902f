"""The pairs that are compared and the targets that they are held to; ``args`` are those of tools/benchmark.py."""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from blpseg import get_cfg
from blpseg.data.dataset_mapper import ScribbleDatasetMapper
from blpseg.engine.optimizer import build_optimizer
from blpseg.evaluation.inference import Inference
from blpseg.modeling.local_aggregation import ShallowEmbedding, local_aggregation
from blpseg.scribbles import convert_annotations

from .literal import LiteralBLPSeg, convert_plainly, plain_inference, write_stroke_files
from .measure import BASELINE, OURS, compare_memory, compare_time, row

SIGMA = 6.0  # METHOD section 3
LITE = "configs/PascalVOC-Scribble/blpseg_lite.yaml"


def _smooth(channels: int, height: int, width: int, texture: float) -> torch.Tensor:
    """(1, channels, height, width): smooth regions and some noise."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randn(1, channels, 6, 6, generator=generator)
    image = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return image + texture * torch.randn(image.shape, generator=generator)


def _image(height: int, width: int) -> torch.Tensor:
    """(3, height, width) float32 in 0..255."""
    return (128 + 50 * _smooth(3, height, width, 0.2)[0]).clamp(0, 255)


def _lam(side, impl, kind, grid, channels, classes, batch, device, amp) -> Callable:
    """Forward and backward of local aggregation -> output and both gradients."""
    generator = torch.Generator().manual_seed(1)
    if kind == "embedding":  # what the model gives LAM at the start of training
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            features = ShallowEmbedding(channels)(_smooth(3, 4 * grid[0], 4 * grid[1], 0.1))
    else:
        features = 4 / channels**0.5 * torch.randn(1, channels, *grid, generator=generator)
    logits, grad = (scale * torch.randn(batch, classes, *grid, generator=generator) for scale in (10, 1))
    dtype = torch.float16 if amp else torch.float32
    logits, features = (x.to(device, dtype).requires_grad_() for x in (logits, features.repeat(batch, 1, 1, 1)))
    grad = grad.to(device)

    def run():
        logits.grad = features.grad = None
        out = local_aggregation(logits, features, SIGMA, impl=impl if side == OURS else "dense")
        out.backward(grad)
        return [x.detach() for x in (out, logits.grad, features.grad)]

    return run


def lam(args: argparse.Namespace) -> Iterator[dict]:
    """``auto`` and ``window`` against ``dense``: time, memory, and the error of the exact one; scaling."""
    size = {key: getattr(args, key) for key in ("channels", "classes", "batch", "device", "amp")}
    gpu = args.device == "cuda"
    goals = {"auto": (5.0, 10.0) if gpu else (1.3, 8.0), "window": (None, None) if gpu else (4.0, 4.0)}
    for impl, kind in (("auto", "embedding"), ("auto", "noise"), ("window", "embedding"), ("sdpa", "embedding")):
        case = f"{impl}, {kind}, {args.channels} x {args.grid[0]} x {args.grid[1]}, {args.classes} classes"
        error = None if impl in ("window", "sdpa") else 1e-2 if args.amp else 2e-4
        arguments = {"impl": impl, "kind": kind, "grid": args.grid, **size}
        yield from _pair("lam", case, arguments, args, *goals.get(impl, (None, None)), error)
    for side, impl in itertools.product(args.grids, ("auto", "window")):
        arguments = {**size, "impl": impl, "kind": "embedding", "grid": (side, side)}
        seconds, _ = compare_time({OURS: _lam(OURS, **arguments)}, 1)
        yield row("lam scaling", f"{impl}, {side} x {side}", "time", seconds[OURS])
        memory = compare_memory("lam", arguments, (OURS,))[OURS]
        yield row("lam scaling", f"{impl}, {side} x {side}", "memory", memory)


def _model(side: str, config: str, device: str, *options):
    cfg = get_cfg(config, ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", *options])
    torch.manual_seed(0)
    return cfg, build_model(cfg) if side == OURS else LiteralBLPSeg(cfg).to(device)


def _train(side, config, crop, batch, device, amp, pseudo=False, loss="") -> Callable[[], list[torch.Tensor]]:
    """One optimiser step -> the losses; with ``pseudo`` one of self-training, every pixel sure of its class; with a
    further ``loss`` of LOSS_REGISTRY at weight 1."""
    keys = "MODEL.BLPSEG.SELF_TRAINING."
    more = (f"MODEL.BLPSEG.LOSSES.{loss}", 1.0) if loss else ()
    cfg, model = _model(side, config, device, keys + "ENABLED", pseudo, keys + "THRESHOLD", 0.0, *more)
    iteration = cfg.MODEL.BLPSEG.SELF_TRAINING.START_ITER + 1  # one at which nothing is logged
    model.train()
    classes, rng = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, np.random.default_rng(0)
    scribble = np.full((crop, crop), classes, np.uint8)
    for label in rng.permutation(classes)[:3].tolist():
        cv2.polylines(scribble, [rng.integers(0, crop, (6, 1, 2), dtype=np.int32)], False, label, thickness=3)
    present = torch.from_numpy(np.isin(np.arange(classes), scribble) | (np.arange(classes) == 0)).to(device)
    image, scribble = _image(crop, crop).to(device), torch.from_numpy(scribble.astype(np.int64)).to(device)
    # Shifted: batch norm of images that are all the same would divide rounding by rounding.
    inputs = [
        {"image": image.roll(by, -1), "scribble": scribble.roll(by, -1), "image_classes": present}
        for by in range(0, crop, -(-crop // batch))
    ]
    optimizer = build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler(device, enabled=amp)

    def run():
        torch.manual_seed(0)  # one dropout mask for both sides and every round
        with EventStorage(iteration), torch.autocast(device, dtype=torch.float16, enabled=amp):
            losses = model(inputs)
        optimizer.zero_grad()
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        return [losses[name].detach() for name in sorted(losses)]

    return run


def train(args: argparse.Namespace) -> Iterator[dict]:
    """Steps of the paper's VOC model, early and with self-training, against the formulas taken literally."""
    for pseudo in (False, True):
        arguments = {"config": args.train_config, "crop": args.crop, "batch": args.train_batch, "device": args.device}
        arguments |= {"amp": args.amp, "pseudo": pseudo}
        case = f"{Path(args.train_config).stem}, {args.train_batch} crops of {args.crop}"
        case += ", self-training" if pseudo else ""
        first = [_train(side, **arguments)() for side in (OURS, BASELINE)]  # from the same weights
        yield row("train", case, "error losses", _error(*first), None, 1e-2 if args.amp else 1e-4)
        yield from _pair("train", case, arguments, args, 2.0 if args.device == "cuda" else 1.4, 2.0)


def losses(args: argparse.Namespace) -> Iterator[dict]:
    """A step of the small pretrained model with each further loss against one without."""
    arguments = {"crop": 160, "batch": 4, "device": args.device, "amp": args.amp}
    for loss in [name for name, weight in get_cfg().MODEL.BLPSEG.LOSSES.items() if not weight]:
        sides = {side: _train(OURS, LITE, loss=loss if side == OURS else "", **arguments) for side in (OURS, BASELINE)}
        seconds, _ = compare_time(sides, args.repeat)
        yield row("losses", f"4 crops of 160, with {loss} vs without", "time", seconds[OURS], seconds[BASELINE])


def _inference(side, config, image_size, device, amp) -> Callable[[], list[torch.Tensor]]:
    """Multi-scale inference of an image -> (C, H, W) logits."""
    cfg, model = _model(side, config, device, "TEST.AUG.ENABLED", True)
    model.eval()
    image = _image(*image_size).to(device)
    inference = Inference.from_config(cfg, model)

    def run():
        with torch.autocast(device, dtype=torch.float16, enabled=amp):
            if side == OURS:
                return [inference([{"image": image}])[0]["sem_seg"]]
            return [plain_inference(model, image, cfg.TEST.AUG.SCALES, cfg.TEST.AUG.FLIP)]

    return run


def inference(args: argparse.Namespace) -> Iterator[dict]:
    """METHOD section 7's 8 views of an image against the plain loop with the dense local aggregation."""
    arguments = {"config": args.train_config, "image_size": args.image_size, "device": args.device, "amp": args.amp}
    case = f"{Path(args.train_config).stem}, {args.image_size[1]} x {args.image_size[0]}, 8 views"
    speed, error = 3.0 if args.device == "cuda" else 1.5, 5e-2 if args.amp else 1e-3
    yield from _pair("inference", case, arguments, args, speed, 2.0, error)


WORKLOADS: dict[str, Callable] = {"lam": _lam, "train": _train, "inference": _inference}


def _error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of two results, relative to the largest value of each tensor."""
    pairs = zip(got, expected, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def _pair(part: str, case: str, arguments: dict, args, speed, memory, error=None) -> Iterator[dict]:
    """Time and memory of a workload against the ratios to reach; with ``error`` also how far the results are apart."""
    sides = {side: WORKLOADS[part](side, **arguments) for side in (OURS, BASELINE)}
    seconds, results = compare_time(sides, args.repeat)
    if error is not None:
        yield row(part, case, "error", _error(results[OURS], results[BASELINE]), None, error)
    del sides, results
    yield row(part, case, "time", seconds[OURS], seconds[BASELINE], speed)
    megabytes = compare_memory(part, arguments)
    yield row(part, case, "memory", megabytes[OURS], megabytes[BASELINE], memory)


def data(args: argparse.Namespace) -> Iterator[dict]:
    """The training mapper in one worker against only decoding the JPEG and one cubic resize."""
    cfg = get_cfg(args.train_config, ["MODEL.DEVICE", "cpu"])
    mapper = ScribbleDatasetMapper(cfg, is_train=True)
    height, width = args.image_size
    image = _image(height, width).permute(1, 2, 0).byte().numpy()
    label = cv2.line(np.full((height, width), 255, np.uint8), (0, 0), (width, height), 0, 3)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # a worker has one core
    with tempfile.TemporaryDirectory() as folder:
        records = [
            {"file_name": f"{folder}/{i}.jpg", "scribble_file_name": f"{folder}/{i}.png", "image_id": str(i),
             "height": height, "width": width} for i in range(args.images)
        ]  # fmt: skip
        for i, record in enumerate(records):
            cv2.imwrite(record["file_name"], np.roll(image, 7 * i, axis=1))
            cv2.imwrite(record["scribble_file_name"], label)

        def decode_and_resize():
            for record, scale in zip(records, np.linspace(*cfg.INPUT.SCALE_RANGE, len(records)), strict=True):
                cv2.resize(cv2.imread(record["file_name"]), None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)

        def map_all():
            rng = np.random.default_rng(0)
            for record in records:
                mapper(record, rng)

        seconds, _ = compare_time({OURS: map_all, BASELINE: decode_and_resize}, args.repeat)
    cv2.setNumThreads(threads)
    case = f"{args.images} images of {width} x {height}, mapper vs decode + resize"
    yield row("data", case, "time", seconds[OURS], seconds[BASELINE], 0.5)


def scribbles(args: argparse.Namespace) -> Iterator[dict]:
    """Stroke files to labels against minidom and a loop over pixels."""
    with tempfile.TemporaryDirectory() as folder:
        write_stroke_files(f"{folder}/xml", args.stroke_files)
        turn = iter(range(1000))

        def convert(function, *more):  # into a new folder each time: labels that are there are not made again
            output = f"{folder}/labels{next(turn)}"
            function(f"{folder}/xml", output, *more)
            return output

        ours = partial(convert_annotations, "xml", progress=False)
        sides = {OURS: lambda: convert(ours, "voc"), BASELINE: lambda: convert(convert_plainly)}
        seconds, made = compare_time(sides, min(args.repeat, 2), warm_up=False)
        names = [f"{number:06d}.png" for number in range(args.stroke_files)]
        labels = [[cv2.imread(f"{made[side]}/{n}", cv2.IMREAD_UNCHANGED) for n in names] for side in (OURS, BASELINE)]
    case = f"{args.stroke_files} stroke files, {os.cpu_count()} CPUs"
    differing = sum(not np.array_equal(a, b) for a, b in zip(*labels, strict=True))
    yield row("scribbles", case, "labels that differ", float(differing), None, 0.0)
    yield row("scribbles", case, "time", seconds[OURS], seconds[BASELINE], 10.0)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Iterator[dict]]] = {
    "lam": lam, "train": train, "losses": losses, "inference": inference, "data": data, "scribbles": scribbles,
}  # fmt: skip
