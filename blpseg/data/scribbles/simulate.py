"""Scribbles as a person might draw them, from a dense mask.

Every connected region gets at least one pen. A pen starts at a pixel whose clearance (distance to the region's
boundary) is as spacious as ``preference`` asks, lays itself along the direction in which that clearance lasts, and
moves both ways in short steps, steering towards equal clearance with a limited turning rate and a little tremor. All
pens of an image move at once, as rows of one array, which is what makes it fast.
"""

from __future__ import annotations

import cv2
import numpy as np

from .rasterize import UNANNOTATED, trace_stroke

__all__ = ["simulate_scribble"]

_SAMPLES = 64  # pixels a pen's starting point is chosen from
_LARGE_REGION = 0.15  # share of the image beyond which a region gets another stroke
_MAX_STROKES = 3  # in one region
_MAX_STEPS = 160  # of a pen, each way
_TURNS = np.linspace(-1, 1, 7)  # candidate turns of a step, as fractions of the largest
_LARGEST_TURN = np.deg2rad(55)  # in one step
_LARGEST_BEND = np.deg2rad(140)  # away from the first direction: a stroke curves, it does not spiral
_LOOK_AHEAD = 2.5  # steps
_DOT_AREA = 12  # pixels; smaller regions get a dot, no pen


def simulate_scribble(
    mask: np.ndarray,
    *,
    preference: float = 0.5,
    length: float = 1.0,
    width: int = 3,
    seed: int = 0,
    ignore_label: int = UNANNOTATED,
) -> np.ndarray:
    """Draw one stroke or more in every connected region (4-neighbourhood) of a dense mask.

    Args:
        mask: (H, W) integer class map, classes 0..254, background included.
        preference: 0 draws anywhere in the region, 1 only in its spacious middle (the label preference of the paper).
        length: stroke length relative to the whole stroke, 0..1: ScribbleSup's shortened scribbles. 0 is a dot.
            A shorter stroke is a part of the longer one of the same seed.
        width: stroke width in pixels, >= 1. A stroke is cut off at its region's boundary whatever its width.
        seed: the result depends on the mask and the arguments alone.
        ignore_label: value of ``mask`` that is no class; never drawn in.

    Returns:
        (H, W) uint8: a class, or 255 for not annotated. Every class of ``mask`` occurs.

    Raises:
        ValueError: if the mask is not a non-empty integer map of 0..254, or an argument is out of its range.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or mask.dtype.kind not in "iu":
        raise ValueError(f"a mask is a non-empty (H, W) integer array, not {mask.shape} {mask.dtype}")
    for name, value in (("preference", preference), ("length", length)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is within 0..1, not {value}")
    if width < 1 or int(width) != width:
        raise ValueError(f"width is a whole number of pixels, 1 or more, not {width}")
    classes = [int(c) for c in np.unique(mask) if c != ignore_label]
    if classes and not (0 <= classes[0] and classes[-1] < UNANNOTATED):
        found = f"{classes[0]}..{classes[-1]}"
        raise ValueError(f"mask values are 0..254 or the ignore value {ignore_label}, not {found}")

    mask = np.where(mask == ignore_label, UNANNOTATED, mask).astype(np.uint8)
    scribble = np.full(mask.shape, UNANNOTATED, dtype=np.uint8)
    if not classes:
        return scribble
    rng = np.random.default_rng(seed)
    regions = _Regions(mask, classes)
    strokes = _walk(regions, preference, rng)
    centres = rng.uniform(0.25, 0.75, len(strokes))  # what a shortened stroke shrinks to
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (int(width), int(width)))
    for (region, points), centre in zip(strokes, centres, strict=True):
        _draw(scribble, regions, region, points, length, centre, brush)
    return scribble


class _Regions:
    """Connected regions of a mask, numbered from 1 in ``label`` ((H, W) int32, 0 = no class), as arrays over regions.

    ``clearance`` ((H, W) float32) is the distance to the region's boundary, 1 on its outermost pixels; the image's
    edge is a boundary too, since people keep away from it.
    """

    def __init__(self, mask: np.ndarray, classes: list[int]):
        self.label = np.zeros(mask.shape, np.int32)
        class_of, boxes = [0], [(0, 0, 0, 0)]
        for class_id in classes:
            here = (mask == class_id).view(np.uint8)
            x, y, w, h = cv2.boundingRect(here)
            count, part, stats, _ = cv2.connectedComponentsWithStats(here[y : y + h, x : x + w], connectivity=4)
            part[part > 0] += len(class_of) - 1
            self.label[y : y + h, x : x + w] += part
            class_of += [class_id] * (count - 1)
            boxes += [(x + s[0], y + s[1], s[2], s[3]) for s in stats[1:].tolist()]
        self.class_of = np.array(class_of)
        self.boxes = np.array(boxes)
        self.area = np.bincount(self.label.reshape(-1), minlength=len(class_of))
        small = np.uint16 if len(class_of) < 1 << 16 else np.int32  # numpy sorts 16 bits by radix
        self.pixels = np.argsort(self.label.reshape(-1).astype(small), kind="stable")  # region after region
        self.first = np.cumsum(self.area) - self.area

        inner = np.ones(mask.shape, np.uint8)
        inner[[0, -1]] = 0
        inner[:, [0, -1]] = 0
        across = self.label[1:] != self.label[:-1]
        inner[1:][across] = 0
        inner[:-1][across] = 0
        across = self.label[:, 1:] != self.label[:, :-1]
        inner[:, 1:][across] = 0
        inner[:, :-1][across] = 0
        self.clearance = cv2.distanceTransform(inner, cv2.DIST_L2, 5) + 1


def _walk(regions: _Regions, preference: float, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
    """The whole strokes (length 1) of an image, as (region, (K, 2) float row, column)."""
    height, width = regions.label.shape
    area = regions.area[1:]
    strokes = 1 + np.minimum(area / (_LARGE_REGION * height * width), _MAX_STROKES - 1).astype(int)
    region = np.repeat(np.arange(1, len(regions.area)), strokes)
    count = len(region)

    # Where to start: of a few pixels of the region, one at a quantile of clearance that the preference asks for.
    # Several strokes of a region start in bands of rows of their own, so that they spread.
    band = np.arange(count) - np.searchsorted(region, region)
    pick = (band[:, None] + rng.random((count, _SAMPLES))) / np.repeat(strokes, strokes)[:, None]
    pick = (pick * regions.area[region, None]).astype(int)
    pick = regions.pixels[regions.first[region, None] + pick]
    pick = np.take_along_axis(pick, np.argsort(regions.clearance.reshape(-1)[pick], axis=1), axis=1)
    quantile = preference + (1 - preference) * rng.random(count)
    pick = pick[np.arange(count), np.minimum((quantile * _SAMPLES).astype(int), _SAMPLES - 1)]
    start = np.stack(np.divmod(pick, width), axis=1).astype(float)
    target = regions.clearance.reshape(-1)[pick]

    step = np.clip(0.5 * target, 1.2, 4.0)
    reach = _LOOK_AHEAD * step
    slack = np.maximum(step, 0.25 * target)
    extent = np.hypot(regions.boxes[region, 2], regions.boxes[region, 3])
    steps = np.minimum(0.5 * extent * rng.uniform(0.8, 1.2, count) / step, _MAX_STEPS).astype(int)
    steps[regions.area[region] < _DOT_AREA] = 0
    floor = np.maximum(1, 0.6 * preference * target)
    turn = np.minimum(step / np.maximum(1.2, 0.5 * target), _LARGEST_TURN)

    margin = 2 + int(np.ceil(reach.max()))  # so that looking ahead needs no bounds check
    label = np.pad(regions.label, margin).reshape(-1)
    clearance = np.pad(regions.clearance, margin).reshape(-1)
    stride = width + 2 * margin

    def look(position, direction, distance):
        """Flat index of the pixel that lies ``distance`` ahead: (P,2), (P,K), (P,) -> (P, K)."""
        rows = np.rint(position[:, :1] + distance[:, None] * np.sin(direction)).astype(np.int64)
        columns = np.rint(position[:, 1:] + distance[:, None] * np.cos(direction)).astype(np.int64)
        return (rows + margin) * stride + columns + margin

    def misfit(ahead, region, target):
        clear = np.where(label[ahead] == region[:, None], clearance[ahead], 0)
        return np.abs(clear - target[:, None])

    # Lie along the direction in which the clearance lasts, both ways.
    axis = rng.uniform(0, np.pi, (count, 1)) + np.linspace(0, np.pi, 12, endpoint=False)
    cost = sum(misfit(look(start, axis + way, reach), region, target) for way in (0, np.pi))
    heading = axis[np.arange(count), cost.argmin(axis=1)]

    # Pens 0..count-1 go forward, the others backward.
    pens = np.arange(2 * count)
    both = np.concatenate([np.arange(count)] * 2)
    position = start[both]
    heading = np.concatenate([heading, heading + np.pi])
    first_heading = heading.copy()
    tremor = np.zeros(2 * count)
    track = np.empty((int(steps.max(initial=0)) + 1, 2 * count, 2))
    track[0] = position
    done = np.zeros(2 * count, int)
    alive = pens[steps[both] > 0]
    for number in range(1, len(track)):
        s = both[alive]
        tremor[alive] = 0.9 * tremor[alive] + 0.25 * rng.standard_normal(len(alive))
        turns = _TURNS * turn[s, None]
        direction = heading[alive, None] + turns
        here, r = position[alive], region[s]
        near = look(here, direction, step[s])
        fits = (label[near] == r[:, None]) & (label[look(here, direction, 0.5 * step[s])] == r[:, None])
        fits &= clearance[near] >= floor[s, None]
        fits &= np.abs(direction - first_heading[alive, None]) <= _LARGEST_BEND
        cost = misfit(look(here, direction, reach[s]), r, target[s]) / slack[s, None]
        cost += (_TURNS - tremor[alive, None]) ** 2
        cost[~fits] = np.inf
        best = cost.argmin(axis=1)
        rows = np.arange(len(alive))
        goes = fits[rows, best]
        alive, best, rows = alive[goes], best[goes], rows[goes]
        heading[alive] = direction[rows, best]
        position[alive, 0] += step[both[alive]] * np.sin(heading[alive])
        position[alive, 1] += step[both[alive]] * np.cos(heading[alive])
        track[number, alive] = position[alive]
        done[alive] = number
        alive = alive[number < steps[both[alive]]]
        if len(alive) == 0:
            break
    return [
        (int(region[k]), np.concatenate([track[done[k + count] : 0 : -1, k + count], track[: done[k] + 1, k]]))
        for k in range(count)
    ]


def _draw(scribble, regions, region, points, length, centre, brush):
    """Set the pixels of a stroke (shortened to ``length`` about ``centre``) that lie in its region."""
    x, y, w, h = regions.boxes[region]
    if len(points) > 2:
        middle = 0.25 * points[:-2] + 0.5 * points[1:-1] + 0.25 * points[2:]
        points = np.concatenate([points[:1], middle, points[-1:]])
    pixels = np.rint(points).astype(np.int64) - (y, x)
    rows, columns = (np.concatenate(part) for part in zip(*trace_stroke(np.clip(pixels, 0, None)), strict=True))
    first, last = (round((len(rows) - 1) * end) for end in (centre * (1 - length), centre * (1 - length) + length))
    rows, columns = rows[first : last + 1], columns[first : last + 1]

    inside = regions.label[y : y + h, x : x + w] == region
    stroke = np.zeros((h, w), np.uint8)
    stroke[rows.clip(0, h - 1), columns.clip(0, w - 1)] = 1
    if brush.size > 1:
        stroke = cv2.dilate(stroke, brush)
    scribble[y : y + h, x : x + w][inside & (stroke > 0)] = regions.class_of[region]
