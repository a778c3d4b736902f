"""The pairs that are compared, and the targets that they are held to."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from blpseg.config import get_cfg
from blpseg.data.dataset_mapper import ScribbleDatasetMapper
from blpseg.engine.optimizer import build_optimizer
from blpseg.evaluation import SemSegEvaluator
from blpseg.evaluation.inference import Inference
from blpseg.modeling.local_aggregation import EPSILON, ShallowEmbedding, local_aggregation
from blpseg.scribbles import convert_xml_folder
from blpseg.utils.errors import BLPSegError

from .literal import LiteralBLPSeg, plain_inference
from .measure import BASELINE, OURS, Row, compare_memory, compare_time
from .stroke_files import convert_plainly, write_stroke_files

__all__ = ["BENCHMARKS", "FEATURES", "WORKLOADS", "Options", "make_features"]

SIGMA = 6.0  # METHOD section 3
VOC_SIZE = (375, 500)


@dataclass(frozen=True)
class Options:
    """How large and how often.

    Attributes:
        device: "cpu" or "cuda".
        amp: mixed precision in the model (LAM alone: inputs in half precision).
        repeat: rounds of each pair; the least time counts.
        grid, channels, classes, batch: of the LAM's logits and features.
        grids: sides of the square grids of the scaling table.
        max_seconds: a side predicted to take longer is left out of the scaling table.
        train_config, tiny_config: of the model of ``train`` and ``inference``; of ``evaluator`` and ``optimizer``.
        crop, train_batch: of the training step.
        image_size: (H, W) of ``inference``, ``data`` and ``evaluator``.
        images: of ``data``.
        stroke_files: of ``scribbles``.
    """

    device: str = "cpu"
    amp: bool = False
    repeat: int = 3
    grid: tuple[int, int] = (96, 96)
    channels: int = 256
    classes: int = 21
    batch: int = 1
    grids: tuple[int, ...] = (48, 96, 192, 384)
    max_seconds: float = 60.0
    train_config: str = "configs/PascalVOC-Scribble/blpseg_R101.yaml"
    tiny_config: str = "configs/Synthetic-Scribble/blpseg_tiny.yaml"
    crop: int = 384
    train_batch: int = 2
    image_size: tuple[int, int] = VOC_SIZE
    images: int = 40
    stroke_files: int = 2000

    def smoke(self) -> Options:
        """Sizes at which only the harness is tried."""
        return replace(
            self, repeat=1, grid=(40, 36), channels=16, classes=4, grids=(16, 36), train_config=self.tiny_config,
            crop=64, image_size=(40, 56), images=2, stroke_files=4,
        )  # fmt: skip


# --- local aggregation ------------------------------------------------------------------------------------------------


def _smooth(channels: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    coarse = torch.randn(1, channels, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)


def _embedding(channels, height, width, generator):
    """What the model gives LAM at the start of training, of an image of smooth regions and some texture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedding = ShallowEmbedding(channels)
    image = _smooth(3, 4 * height, 4 * width, generator)
    image = image + 0.1 * torch.randn(image.shape, generator=generator)
    with torch.no_grad():
        return embedding(image)


def _far(channels, height, width, generator):
    """All alike but one corner, longer by so much that it takes nearly all weight everywhere."""
    features = 0.05 * torch.randn(1, channels, height, width, generator=generator)
    features[:, 0] = 1
    features[:, 0, -1, -1] = 30
    return features


FEATURES: dict[str, Callable] = {
    "embedding": _embedding,
    "smooth": lambda *size: _smooth(*size),
    "noise": lambda c, h, w, g: 4 / c**0.5 * torch.randn(1, c, h, w, generator=g),
    "far position wins": _far,
    "long": lambda c, h, w, g: 30 * _smooth(c, h, w, g),
}


def make_features(kind: str, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(1, channels, height, width) features of a kind in :data:`FEATURES`."""
    return FEATURES[kind](channels, height, width, torch.Generator().manual_seed(seed))


def _lam(
    side: str, impl: str, kind: str, grid, channels: int, classes: int, batch: int, device: str, amp: bool,
    dtype: str = "float32",
) -> Callable[[], list[torch.Tensor]]:  # fmt: skip
    """Forward and backward of local aggregation -> output and both gradients."""
    generator = torch.Generator().manual_seed(1)
    features = make_features(kind, channels, *grid).repeat(batch, 1, 1, 1)
    logits = 10 * torch.randn(batch, classes, *grid, generator=generator)
    grad = torch.randn(batch, classes, *grid, generator=generator)
    dtype = torch.float16 if amp else getattr(torch, dtype)
    logits, features = (x.to(device, dtype).requires_grad_() for x in (logits, features))
    grad = grad.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    impl = impl if side == OURS else "dense"

    def run():
        logits.grad = features.grad = None
        out = local_aggregation(logits, features, SIGMA, impl=impl)
        out.backward(grad)
        return [x.detach() for x in (out, logits.grad, features.grad)]

    return run


def _errors(got: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> list[float]:
    return [
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(got, expected, strict=True)
    ]


def lam(options: Options) -> Iterable[Row]:
    """``auto``, ``window`` and the other forms against ``dense``; errors; scaling."""
    size = {"grid": options.grid, "channels": options.channels, "classes": options.classes, "batch": options.batch}
    size |= {"device": options.device, "amp": options.amp}
    shape = f"{options.batch} x {options.channels} x {options.grid[0]} x {options.grid[1]}, {options.classes} classes"
    gpu = options.device == "cuda"
    needed = _dense_bytes(options.grid, options.batch)
    fits = needed <= _free_memory(options.device)
    targets = {"auto": (5.0, 10.0) if gpu else (1.3, 8.0), "window": (None, None) if gpu else (4.0, 4.0)}
    pairs = [("auto", "embedding"), ("auto", "noise"), ("auto", "long"), ("window", "embedding"), ("sdpa", "embedding")]
    for impl, kind in pairs:
        arguments = {"impl": impl, "kind": kind, **size}
        # Of long features auto computes in float64.
        speed, memory = (None, None) if kind == "long" else targets.get(impl, (None, None))
        if not fits:
            note = f"left out: the dense tables would take {needed / 2**30:.0f} GiB"
            yield Row("lam", f"{impl}, {kind} ({shape})", "time", None, note=note)
            continue
        yield from _pair("lam", f"{impl}, {kind} ({shape})", "lam", arguments, options, speed, memory)
    # Against float64, which the tables of the full grid would not leave room for.
    grid = tuple(min(side, 64) for side in options.grid)
    small = {**size, "grid": grid, "batch": 1, "amp": False}
    for kind in FEATURES:
        expected = _lam(BASELINE, "dense", kind, **small, dtype="float64")()
        for impl in ("auto", "dense", "window"):
            errors = _errors(_lam(OURS, impl, kind, **small)(), expected)
            for what, error in zip(("output", "grad logits", "grad features"), errors, strict=True):
                target = 1e-4 if impl == "auto" else None
                yield Row("lam", f"{impl}, {kind} (grid {grid[0]} x {grid[1]})", f"error {what}", error, target=target)
    yield from _half_precision(small)
    yield from _scaling(size, options)


def _half_precision(small: dict) -> Iterable[Row]:
    """What rounding the features alone, or their dot products alone, does to the result, all else in float64."""
    height, width = small["grid"]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    decay = torch.exp(torch.cdist(place, place).square() / (-2 * SIGMA**2))
    for kind in ("embedding", "noise", "long"):
        features = make_features(kind, small["channels"], height, width)
        logits = 10 * torch.randn(1, small["classes"], height, width, generator=torch.Generator().manual_seed(1))
        expected = local_aggregation(logits.double(), features.double(), SIGMA, impl="dense")[0]
        flat = features[0].flatten(1).double()
        products = flat.T @ flat
        for dtype in (torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            rounded = features.to(dtype).double()
            got = local_aggregation(logits.double(), rounded, SIGMA, impl="dense")[0]
            yield Row("lam", f"features in {name}, {kind}", "error output", *_errors([got], [expected]))
            case = f"dot products in {name}, {kind}"
            if not products.to(dtype).isfinite().all():
                yield Row("lam", case, "error output", None, note=f"{float(products.max()):.3g} is beyond {name}")
                continue
            weight = torch.softmax(products.to(dtype).double(), dim=1) * decay
            weight /= weight.sum(dim=1, keepdim=True) + EPSILON
            got = (logits[0].flatten(1).double() @ weight.T).view_as(expected)
            yield Row("lam", case, "error output", *_errors([got], [expected]))


def _scaling(size: dict, options: Options) -> Iterable[Row]:
    last: dict[str, tuple[int, float]] = {}
    figures: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for side in dict.fromkeys(options.grids):
        for impl in ("auto", "window", "dense"):
            case = f"{impl}, {side} x {side}"
            arguments = {**size, "impl": impl, "kind": "embedding", "grid": (side, side)}
            power = 1 if impl == "window" else 2
            predicted = last[impl][1] * (side / last[impl][0]) ** (2 * power) if impl in last else 0
            tables = _dense_bytes((side, side), size["batch"]) if impl == "dense" else 0
            if predicted > options.max_seconds or tables > _free_memory(options.device):
                reason = f"about {predicted:.0f} s" if predicted > options.max_seconds else f"{tables / 2**30:.0f} GiB"
                yield Row("lam scaling", case, "time", None, note=f"left out: would take {reason}")
                continue
            seconds, _ = compare_time({OURS: _lam(OURS, **arguments)}, 1, warm_up=side == options.grids[0])
            last[impl] = side, seconds[OURS]
            yield Row("lam scaling", case, "time", seconds[OURS])
            memory = compare_memory("lam", arguments, (OURS,))[OURS]
            yield Row("lam scaling", case, "memory", memory)
            for quantity, value in (("time", seconds[OURS]), ("memory", memory)):
                figures.setdefault((impl, quantity), []).append((side * side, value))
    # 1 is linear in the number of positions, 2 quadratic. The border still counts at the smaller grid of the two.
    most = {("auto", "memory"): 1.1, ("window", "memory"): 1.1, ("window", "time"): 1.25}
    for (impl, quantity), points in figures.items():
        if len(points) > 1 and all(value > 0 for _, value in points[-2:]):
            (n, a), (m, b) = points[-2:]
            case = f"{impl}, {n} to {m} positions"
            power = math.log(b / a) / math.log(m / n)
            yield Row("lam scaling", case, f"exponent of {quantity}", power, target=most.get((impl, quantity)))


def _dense_bytes(grid: tuple[int, int], batch: int) -> int:
    """About six tables: scores, softmax, decay, weights and gradients of two of them."""
    return 6 * 4 * batch * (grid[0] * grid[1]) ** 2


def _free_memory(device: str) -> float:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    if not os.path.exists("/proc/meminfo"):
        return float("inf")
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


# --- model ------------------------------------------------------------------------------------------------------------


def _model(side: str, config: str, device: str, *options):
    cfg = get_cfg(config, ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", *options])
    torch.manual_seed(0)
    model = build_model(cfg) if side == OURS else LiteralBLPSeg(cfg).to(device)
    return cfg, model


def _smooth_image(height: int, width: int) -> torch.Tensor:
    """(3, height, width) float32 in 0..255."""
    generator = torch.Generator().manual_seed(2)
    image = _smooth(3, height, width, generator) + 0.2 * torch.randn(1, 3, height, width, generator=generator)
    return (128 + 50 * image[0]).clamp(0, 255)


def _train(
    side: str, config: str, crop: int, batch: int, device: str, amp: bool, pseudo: bool = False
) -> Callable[[], dict]:
    """One optimiser step -> the losses; with ``pseudo`` one of self-training, every pixel sure of its class."""
    options = ("MODEL.BLPSEG.SELF_TRAINING.ENABLED", pseudo, "MODEL.BLPSEG.SELF_TRAINING.THRESHOLD", 0.0)
    cfg, model = _model(side, config, device, *options)
    iteration = cfg.MODEL.BLPSEG.SELF_TRAINING.START_ITER + 1  # one at which nothing is logged
    model.train()
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    scribble = np.full((crop, crop), classes, np.uint8)
    rng = np.random.default_rng(0)
    for label in rng.permutation(classes)[:3].tolist():
        points = rng.integers(0, crop, (6, 1, 2), dtype=np.int32)
        cv2.polylines(scribble, [points], False, label, thickness=3)
    present = np.isin(np.arange(classes), scribble)
    present[0] = True
    record = {
        "image": _smooth_image(crop, crop),
        "scribble": torch.from_numpy(scribble.astype(np.int64)),
        "image_classes": torch.from_numpy(present),
    }
    # Batch norm of images that are all the same would divide rounding by rounding.
    inputs = [
        {
            key: (value if key == "image_classes" else value.roll(k * crop // batch, dims=-1)).to(device)
            for key, value in record.items()
        }
        for k in range(batch)
    ]
    optimizer = build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler(device, enabled=amp)

    def run():
        # One dropout mask for both sides and every round.
        torch.manual_seed(0)
        with EventStorage(iteration), torch.autocast(device, dtype=torch.float16, enabled=amp):
            losses = model(inputs)
        optimizer.zero_grad()
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    return run


def train(options: Options) -> Iterable[Row]:
    """Steps of the paper's VOC model as shipped, early and with self-training, against the formulas taken literally."""
    for pseudo in (False, True):
        arguments = {"config": options.train_config, "crop": options.crop, "batch": options.train_batch}
        arguments |= {"device": options.device, "amp": options.amp, "pseudo": pseudo}
        # A first step each, from the same weights: the same losses.
        first = {side: _train(side, **arguments)() for side in (OURS, BASELINE)}
        case = f"{_name(options.train_config)}, {options.train_batch} crops of {options.crop}"
        case += ", self-training" if pseudo else ""
        for name, value in first[OURS].items():
            error = abs(value / first[BASELINE][name] - 1)
            yield Row("train", case, f"error {name}", error, target=1e-2 if options.amp else 1e-4)
        yield from _pair("train", case, "train", arguments, options, 2.0 if options.device == "cuda" else 1.4, 2.0)


def _inference(side: str, config: str, image_size, device: str, amp: bool) -> Callable[[], torch.Tensor]:
    """Multi-scale inference of an image -> (C, H, W) logits."""
    cfg, model = _model(side, config, device)
    cfg.TEST.AUG.ENABLED = True
    model.eval()
    image = _smooth_image(*image_size).to(device)
    inference = Inference.from_config(cfg, model)

    def run():
        with torch.autocast(device, dtype=torch.float16, enabled=amp):
            if side == OURS:
                return inference([{"image": image}])[0]["sem_seg"]
            return plain_inference(model, image, cfg.TEST.AUG.SCALES, cfg.TEST.AUG.FLIP)

    return run


def inference(options: Options) -> Iterable[Row]:
    """METHOD section 7's 8 views of an image against the plain loop with the dense local aggregation."""
    arguments = {"config": options.train_config, "image_size": options.image_size}
    arguments |= {"device": options.device, "amp": options.amp}
    case = f"{_name(options.train_config)}, {options.image_size[1]} x {options.image_size[0]}, 8 views"
    speed = 3.0 if options.device == "cuda" else 1.5
    fewer = replace(options, repeat=min(options.repeat, 2))
    error = 5e-2 if options.amp else 1e-3
    yield from _pair("inference", case, "inference", arguments, fewer, speed, 2.0, error)


def _name(config: str) -> str:
    return os.path.splitext(os.path.basename(config))[0]


def _pair(
    benchmark: str,
    case: str,
    workload: str,
    arguments: dict,
    options: Options,
    speed: float | None,
    memory: float | None,
    error: float | None = None,
) -> Iterable[Row]:
    """Rows of time and memory of a workload; ``speed`` and ``memory`` are the ratios to reach.

    With ``error`` also one of how far the results, tensors, are apart, which it is the most of.
    """
    sides = {side: WORKLOADS[workload](side, **arguments) for side in (OURS, BASELINE)}
    # One warm-up round: optimiser state and caches of the allocator.
    seconds, results = compare_time(sides, options.repeat)
    if error is not None:
        yield Row(benchmark, case, "error output", *_errors([results[OURS]], [results[BASELINE]]), target=error)
    del sides, results
    yield Row(benchmark, case, "time", seconds[OURS], seconds[BASELINE], speed)
    megabytes = compare_memory(workload, arguments)
    yield Row(benchmark, case, "memory", megabytes[OURS], megabytes[BASELINE], memory)


# --- data -------------------------------------------------------------------------------------------------------------


def _write_images(folder: str, count: int, size: tuple[int, int]) -> list[dict]:
    """JPEG photographs of a kind, with scribbles; records as a data set has them."""
    image = _smooth_image(*size).permute(1, 2, 0).byte().numpy()
    label = np.full(size, 255, np.uint8)
    cv2.line(label, (0, 0), size[::-1], 0, 3)
    cv2.line(label, (size[1], 0), (0, size[0]), 1, 3)
    records = []
    for i in range(count):
        names = [os.path.join(folder, f"{i}{extension}") for extension in (".jpg", ".png")]
        cv2.imwrite(names[0], np.roll(image, 7 * i, axis=1))
        cv2.imwrite(names[1], label)
        records.append(
            {"file_name": names[0], "scribble_file_name": names[1], "sem_seg_file_name": names[1], "image_id": str(i),
             "height": size[0], "width": size[1]}
        )  # fmt: skip
    return records


def data(options: Options) -> Iterable[Row]:
    """The training mapper in one worker against only decoding the JPEG and one cubic resize."""
    cfg = get_cfg(options.train_config, ["MODEL.DEVICE", "cpu"])
    mapper = ScribbleDatasetMapper(cfg, is_train=True)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # a worker has one core
    with tempfile.TemporaryDirectory() as folder:
        records = _write_images(folder, options.images, options.image_size)

        def decode_and_resize():
            for record, scale in zip(records, np.linspace(*cfg.INPUT.SCALE_RANGE, len(records)), strict=True):
                image = cv2.imread(record["file_name"])
                cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)

        def map_all():
            rng = np.random.default_rng(0)
            for record in records:
                mapper(record, rng)

        seconds, _ = compare_time({OURS: map_all, BASELINE: decode_and_resize}, options.repeat)
    cv2.setNumThreads(threads)
    case = f"{options.images} images of {options.image_size[1]} x {options.image_size[0]}, mapper vs decode + resize"
    yield Row("data", case, "time", seconds[OURS], seconds[BASELINE], 0.5)


def scribbles(options: Options) -> Iterable[Row]:
    """Stroke files to labels against minidom and a loop over pixels."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "xml")
        write_stroke_files(source, options.stroke_files)
        turn = iter(range(1000))

        # Into a new folder each time: labels that are there are not made again.
        def ours():
            output = os.path.join(folder, f"labels{next(turn)}")
            report = convert_xml_folder(source, output, "voc")
            if report.written != options.stroke_files:
                raise BLPSegError(f"scribbles benchmark: {report.written} labels from {options.stroke_files} files")
            return output

        def baseline():
            output = os.path.join(folder, f"labels{next(turn)}")
            convert_plainly(source, output)
            return output

        sides = {OURS: ours, BASELINE: baseline}
        seconds, folders = compare_time(sides, min(options.repeat, 2), warm_up=False)
        labels = {
            side: [cv2.imread(os.path.join(labels, name), cv2.IMREAD_UNCHANGED) for name in sorted(os.listdir(labels))]
            for side, labels in folders.items()
        }
        differing = sum(not np.array_equal(a, b) for a, b in zip(labels[OURS], labels[BASELINE], strict=True))
    case = f"{options.stroke_files} stroke files, {os.cpu_count()} CPUs"
    yield Row("scribbles", case, "time", seconds[OURS], seconds[BASELINE], 10.0)
    yield Row("scribbles", case, "labels that differ", float(differing), target=0.0)


def evaluator(options: Options) -> Iterable[Row]:
    """Accumulating the confusion of an image against the tiny model's forward of it."""
    cfg, model = _model(OURS, options.tiny_config, options.device)
    model.eval()
    name = "blpseg_benchmark"
    with tempfile.TemporaryDirectory() as folder:
        records = _write_images(folder, 1, options.image_size)
        DatasetCatalog.register(name, lambda: records)
        classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        try:
            MetadataCatalog.get(name).set(
                stuff_classes=[str(c) for c in range(classes)], stuff_colors=[(c, c, c) for c in range(classes)],
                ignore_label=255, evaluator_type="sem_seg",
            )  # fmt: skip
            evaluator = SemSegEvaluator(name)
            evaluator.reset()
            inputs = [{**records[0], "image": _smooth_image(*options.image_size)}]
            with torch.no_grad():
                outputs = model(inputs)
                sides = {OURS: partial(evaluator.process, inputs, outputs), BASELINE: partial(model, inputs)}
                seconds, _ = compare_time(sides, max(options.repeat, 5))
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    case = f"{_name(options.tiny_config)}, {options.image_size[1]} x {options.image_size[0]}: confusion vs forward"
    yield Row("evaluator", case, "time", seconds[OURS], seconds[BASELINE], 20.0)


def optimizer(options: Options) -> Iterable[Row]:
    """A step of the tiny model's optimiser against the same one in torch's default form."""
    models = [_model(OURS, options.tiny_config, options.device) for _ in range(2)]
    steps = []
    for (cfg, model), build in zip(models, (build_optimizer, _plain_adamw), strict=True):
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.grad = (1e-2 * torch.randn(parameter.shape, generator=generator)).to(parameter.device)
        steps.append(build(cfg, model).step)
    seconds, _ = compare_time(dict(zip((OURS, BASELINE), steps, strict=True)), max(options.repeat, 5))
    pairs = zip(*(model.parameters() for _, model in models), strict=True)
    error = max(float((ours - plain).detach().abs().max()) for ours, plain in pairs)
    count = sum(parameter.numel() for parameter in models[0][1].parameters())
    case = f"{_name(options.tiny_config)}, {count / 1e6:.1f} M weights"
    yield Row("optimizer", case, "time", seconds[OURS], seconds[BASELINE])
    yield Row("optimizer", case, "error weights", error, target=1e-5)


def _plain_adamw(cfg, model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


WORKLOADS: dict[str, Callable] = {"lam": _lam, "train": _train, "inference": _inference}

BENCHMARKS: dict[str, Callable[[Options], Iterable[Row]]] = {
    "lam": lam,
    "train": train,
    "inference": inference,
    "data": data,
    "scribbles": scribbles,
    "evaluator": evaluator,
    "optimizer": optimizer,
}
