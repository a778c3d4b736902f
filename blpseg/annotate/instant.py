"""The instant model: frozen features of a pretrained network and a logistic regression on one photo's strokes.

A prediction is a linear map of feature maps at several strides. Enlarging maps and summing channels commute, so that
the regression's weights are applied at each stride, and only a map for each class is enlarged. The class maps at stride
4 are brought to the photo's pixels along the photo's edges by the guided filter (He & Sun, "Fast Guided Filter", 2015).
"""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from ..scribbles.rasterize import UNANNOTATED
from ..utils.files import read_image, write_bytes_atomic
from .store import Photo, Project

STRIDE = 4  # of the grid that class maps are computed on, working pixels
# The longer side of a working picture: smaller photos are enlarged, by 4 at most, larger ones reduced.
_SIDES = 640, 800
_LARGEST_SCALE = 4.0
_PIXELS = 2000  # of the strokes that the regression is fitted to
_ITERATIONS = 40
_DECAY = 1e-3
_RADIUS, _EPSILON = 4, 1e-4  # of the guided filter: grid cells, variance of a channel in 0..1
_TRUST = 0.25  # weight of a trained model's log probabilities against the regression's
_LEAST_LOG = -6.0  # they are cut off here: a trained model can be sure and wrong
_ANCHORS, _ANCHOR_WEIGHT = 500, 0.1  # cells that shall stay as the trained model has them; all strokes weigh 1
_REFITS, _REFIT_ITERATIONS = 2, 8  # without the anchors that the strokes contradict
_IN_MEMORY = 8  # photos
_FORMAT = 1  # of the files of features; another number makes them anew


@dataclass
class Features:
    """What the instant model knows of a photo before the first stroke.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        levels: (factor, map): (C, h, w) float32, whose cells are ``factor`` cells of the grid wide and high.
        grid: (rows, columns) of the grid.
        guide: (rows, columns, 3) float32, the photo on the grid, 0..1.
        log_model: (classes, rows, columns) log probabilities of the trained model, or None.
        decoded: (D, rows, columns) float32, its decoder's features, every position of unit length, or None.
    """

    image: np.ndarray
    levels: list[tuple[int, np.ndarray]]
    grid: tuple[int, int]
    guide: np.ndarray
    log_model: np.ndarray | None = None
    decoded: np.ndarray | None = None


class Instant:
    """Predictions of a project's photos from their strokes, and from the trained model where there is one."""

    def __init__(self, project: Project):
        self.project = project
        self.folder = project.root / ".cache/features"
        self._network = self._wanted = None
        self._known: OrderedDict[tuple, Features] = OrderedDict()
        self._lock = threading.RLock()
        self._background = ThreadPoolExecutor(1)

    def prepare(self, photo: Photo | None = None) -> None:
        """Load the network, and compute a photo's features, in the background: the first stroke will not wait.

        Of several photos that wait, the last one is taken.
        """

        def work():
            with self._lock:
                self._load_network()
                wanted, self._wanted = self._wanted, None
                if wanted:
                    self.features(wanted, self.model_file(wanted))

        self._wanted = photo
        self._background.submit(work)

    def close(self) -> None:
        """End what is under way in the background."""
        self._background.shutdown(cancel_futures=True)

    def predict(self, photo: Photo) -> tuple[np.ndarray, str]:
        """The class map from the strokes as they are.

        Returns:
            (H, W) uint8, 255 where nothing is known, and what it was made with: "strokes", "model", "both", "none".
        """
        label = self.project.rasterize(photo, self.project.read(photo))
        drawn = np.setdiff1d(np.unique(label), UNANNOTATED)
        model = self.model_file(photo)
        if not len(drawn) and model is None:
            return label, "none"
        with self._lock:
            features = self.features(photo, model)
            logits, classes = join(features, label)
        prediction = guided(features, logits, classes)
        prediction[label != UNANNOTATED] = label[label != UNANNOTATED]
        return prediction, "both" if len(drawn) and model else "model" if model else "strokes"

    def model_file(self, photo: Photo) -> str | None:
        """Where the trained model's view of a photo lies, if there is one."""
        path = model_path(self.project.root, photo.stem)
        return path if os.path.exists(path) else None

    def features(self, photo: Photo, model: str | None) -> Features:
        classes = len(self.project.classes)  # the page can add one
        key = (photo.name, photo.path.stat().st_mtime_ns, model and os.stat(model).st_mtime_ns, classes)
        if key not in self._known:
            features = self._compute(photo)
            if model:
                _add_model(features, model, classes)
            self._known[key] = features
        self._known.move_to_end(key)
        while len(self._known) > _IN_MEMORY:
            self._known.popitem(last=False)
        return self._known[key]

    def _compute(self, photo: Photo) -> Features:
        image = read_image(str(photo.path))
        small = working_picture(image)
        height, width = small.shape[:2]
        grid = -(-height // STRIDE), -(-width // STRIDE)
        guide = cv2.resize(small, grid[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        path = str(self.folder / f"{photo.stem}.npz")
        stamp = np.array([_FORMAT, photo.path.stat().st_mtime_ns, height, width])
        arrays = load_arrays(path)
        if arrays is None or not np.array_equal(arrays.pop("stamp"), stamp):
            arrays = {f"level{i}": level.astype(np.float16) for i, level in enumerate(self._extract(small))}
            save_arrays(path, stamp=stamp, **arrays)
        lab = cv2.cvtColor(guide, cv2.COLOR_RGB2LAB) / 100
        color = np.concatenate([lab, cv2.blur(lab, (3, 3))], axis=2).transpose(2, 0, 1)
        maps = [(2**i, np.float32(arrays[f"level{i}"])) for i in range(len(arrays))]
        return Features(image, [*maps, (1, color)], grid, guide)

    def _extract(self, image: np.ndarray) -> list[np.ndarray]:
        """Feature maps of the pretrained network at strides 4, 8, 16, 32, every position of unit length."""
        import torch

        network = self._load_network()
        mean, std = (np.float32(v) for v in (network.pixel_mean, network.pixel_std))
        bottom, right = (-side % network.size_divisibility for side in image.shape[:2])
        padded = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        batch = torch.from_numpy((padded - mean) / std).permute(2, 0, 1)[None]
        with torch.inference_mode():
            maps = network(batch)
        return [torch.nn.functional.normalize(level, dim=1)[0].numpy() for level in maps.values()]

    def _load_network(self):
        if self._network is None:
            import scipy.optimize  # noqa: F401  (the first fit should not wait for it)

            from ..modeling.timm_backbone import pretrained_features

            self._network = pretrained_features()
        return self._network


def working_picture(image: np.ndarray) -> np.ndarray:
    """A photo, (H, W, 3) uint8, at the size that features are computed at."""
    longest = max(image.shape[:2])
    scale = min(np.clip(longest, *_SIDES) / longest, _LARGEST_SCALE)
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def join(features: Features, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class logits on the grid from strokes and, where there is one, a trained model.

    Args:
        features: of the photo.
        label: (H, W) uint8 strokes, 255 = not annotated.

    Returns:
        logits (K, rows, columns), and the K class numbers, ascending: those drawn, or all that the model knows.
    """
    rows, columns = np.nonzero(label != UNANNOTATED)
    classes = np.unique(label[rows, columns])
    if len(rows) > _PIXELS:
        chosen = np.random.default_rng(0).permutation(len(rows))[:_PIXELS]
        rows, columns = rows[chosen], columns[chosen]
    place = [(index + 0.5) / size * cells for index, size, cells in
             zip((rows, columns), label.shape, features.grid, strict=True)]  # fmt: skip
    drawn, known = label[rows, columns], features.log_model
    drawn_classes = classes
    if known is None:
        offset = np.zeros((len(classes), *features.grid), np.float32)
    else:
        classes = np.arange(len(known))
        offset = _TRUST * np.maximum(known, _LEAST_LOG)
    if not len(rows) or len(classes) == 1:
        return offset, classes
    levels = features.levels if features.decoded is None else [*features.levels, (1, features.decoded)]
    target = np.searchsorted(classes, drawn)
    share = 1 / np.bincount(target)[target] / len(drawn_classes)  # classes count alike
    if known is not None:
        # Without them a single stroke, all of one class, would draw the whole photo to itself.
        anchors = np.random.default_rng(0).integers(0, np.prod(features.grid), _ANCHORS)
        cells = np.unravel_index(anchors, features.grid)
        place = [np.concatenate([p, c + 0.5]) for p, c in zip(place, cells, strict=True)]
        target = np.concatenate([target, known.argmax(axis=0)[cells]])
        share = np.concatenate([share, np.full(_ANCHORS, _ANCHOR_WEIGHT / _ANCHORS)])
    samples = np.concatenate([_sample(level, place, factor) for factor, level in levels], axis=1)
    given = _sample(offset, place)
    weights, bias = fit(samples, target, len(classes), share, given)
    # Strokes of one class say nothing of the others, so that they contradict no anchor.
    for _ in range(_REFITS if known is not None and len(drawn_classes) > 1 else 0):
        agrees = (samples @ weights + bias + given).argmax(axis=1) == target
        agrees[: len(drawn)] = True
        weights, bias = fit(samples, target, len(classes), share * agrees, given, (weights, bias), _REFIT_ITERATIONS)
    logits = offset + bias[:, None, None]
    first = 0
    for factor, level in levels:
        part = np.tensordot(weights[first : first + len(level)].T, level, axes=1)
        logits = logits + _enlarge(part, factor, features.grid)
        first += len(level)
    return logits, classes


def fit(
    samples: np.ndarray,
    target: np.ndarray,
    count: int,
    share: np.ndarray,
    offset: np.ndarray | float = 0.0,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    iterations: int = _ITERATIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression with L2 decay, by L-BFGS.

    Args:
        samples: (N, D) float32.
        target: (N,) class numbers 0..count - 1.
        count: of classes.
        share: (N,) weight of each sample's cross entropy.
        offset: (N, count) logits that the regression adds to.
        start: weights and bias to start from; zeros if None.
        iterations: at most.

    Returns:
        weights (D, count) and bias (count,).
    """
    from scipy.optimize import minimize  # here, since it takes as long to import as the whole server

    share = share.astype(np.float32)[:, None]
    samples = np.concatenate([samples, np.ones((len(samples), 1), np.float32)], axis=1)
    truth = np.eye(count, dtype=np.float32)[target]

    def loss(flat):
        weights = flat.reshape(-1, count).astype(np.float32)
        logits = samples @ weights + offset
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        gradient = samples.T @ ((np.exp(logits) - truth) * share) + 2 * _DECAY * weights
        value = -(share * truth * logits).sum() + _DECAY * (weights**2).sum()
        return float(value), gradient.astype(np.float64).reshape(-1)

    first = np.zeros((samples.shape[1], count)) if start is None else np.vstack(start)
    best = minimize(loss, first.reshape(-1), jac=True, method="L-BFGS-B", options={"maxiter": iterations}).x
    best = best.reshape(-1, count).astype(np.float32)
    return best[:-1], best[-1]


def guided(features: Features, logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Class map at the photo's size from logits on the grid: (H, W) uint8.

    Every class probability is a linear function of the colour in a window of the grid, and is evaluated with the
    colours of the photo.
    """
    if len(classes) == 1:
        return np.full(features.image.shape[:2], classes[0], np.uint8)
    probability = np.exp(logits - logits.max(axis=0))
    probability /= probability.sum(axis=0)
    height, width = features.image.shape[:2]
    guide, inverse, mean = features.guide, *_covariance(features.guide)
    best = np.full((height, width), -np.inf, np.float32)
    result = np.full((height, width), classes[0], np.uint8)
    image = features.image.astype(np.float32) / 255
    for number, p in zip(classes, probability, strict=True):
        if p.max() < 1 / len(classes):
            continue  # nowhere the most probable
        mean_p = _box(p)
        slope = np.einsum("hwij,hwj->hwi", inverse, _box(guide * p[..., None]) - mean * mean_p[..., None])
        line = np.dstack([slope, mean_p - (slope * mean).sum(axis=2)]).astype(np.float32)
        line = cv2.resize(_box(line), (width, height), interpolation=cv2.INTER_LINEAR)
        value = np.einsum("hwc,hwc->hw", line[..., :3], image) + line[..., 3]
        better = value > best
        result[better] = number
        np.maximum(best, value, out=best)
    return result


def _covariance(guide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse covariance (h, w, 3, 3) and mean (h, w, 3) of the colours around each cell."""
    mean = _box(guide)
    products = _box((guide[..., :, None] * guide[..., None, :]).reshape(*guide.shape[:2], 9))
    covariance = products.reshape(*guide.shape, 3) - mean[..., :, None] * mean[..., None, :]
    return np.linalg.inv(covariance + _EPSILON * np.eye(3, dtype=np.float32)), mean


def _box(array: np.ndarray) -> np.ndarray:
    return cv2.blur(np.ascontiguousarray(array, np.float32), (2 * _RADIUS + 1,) * 2, borderType=cv2.BORDER_REFLECT)


def _sample(level: np.ndarray, place: Sequence[np.ndarray], factor: int = 1) -> np.ndarray:
    """(N, C) values of a map at positions in grid cells, bilinear."""
    y, x = (np.float32(p / factor - 0.5)[:, None] for p in place)
    top, left = np.floor(y).astype(int)[:, 0], np.floor(x).astype(int)[:, 0]
    down, right = y - np.floor(y), x - np.floor(x)
    rows = [np.clip(top + i, 0, level.shape[1] - 1) for i in (0, 1)]
    columns = [np.clip(left + i, 0, level.shape[2] - 1) for i in (0, 1)]
    (a, b), (c, d) = ([level[:, row, column].T for column in columns] for row in rows)
    return (a * (1 - right) + b * right) * (1 - down) + (c * (1 - right) + d * right) * down


def _enlarge(maps: np.ndarray, factor: int, grid: tuple[int, int]) -> np.ndarray:
    """Maps (C, h, w) brought to the grid; their padding beyond it is cut off."""
    if factor > 1:
        maps = _to_grid(maps, (maps.shape[1] * factor, maps.shape[2] * factor))
    return maps[:, : grid[0], : grid[1]]


def _add_model(features: Features, path: str, classes: int) -> None:
    """Let a trained model's decoder features and log probabilities join; they lie over the whole photo."""
    arrays = load_arrays(path)
    if arrays is None or len(arrays["log_probability"]) > classes:
        return
    decoded = _to_grid(arrays["features"], features.grid)
    features.decoded = decoded / np.maximum(np.linalg.norm(decoded, axis=0), 1e-6)
    known = _to_grid(arrays["log_probability"], features.grid)
    features.log_model = np.concatenate([known, np.full((classes - len(known), *features.grid), _LEAST_LOG)])


def _to_grid(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    return np.stack([cv2.resize(np.float32(m), grid[::-1], interpolation=cv2.INTER_LINEAR) for m in maps])


def model_path(root: str | os.PathLike, stem: str) -> str:
    """Where :mod:`.predict_all` leaves what the trained model says of a photo."""
    return os.path.join(root, ".cache/model", f"{stem}.npz")


def load_arrays(path: str) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz file; None where it is missing or damaged, since all of them can be made anew."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def save_arrays(path: str, **arrays: np.ndarray) -> None:
    """Write an .npz file in one step."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes_atomic(path, buffer.getvalue())
