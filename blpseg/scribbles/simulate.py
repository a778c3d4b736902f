"""Scribbles as a person might draw them, from a dense mask.

Every connected region gets at least one pen. A pen starts at a pixel whose clearance (distance to the region's
boundary) is as spacious as ``preference`` asks, lays itself along the direction in which that clearance lasts, and
moves both ways in short steps, steering towards equal clearance with a limited turning rate and a little tremor. For
speed all pens of an image move at once, as rows of one array.
"""

from __future__ import annotations

import cv2
import numpy as np

from ..utils.labels import UNANNOTATED
from .rasterize import segment_lengths, segment_pixels

_SAMPLES = 64  # pixels a pen's starting point is chosen from
_LARGE_REGION = 0.25  # share of the image beyond which a region gets another stroke
_MAX_STROKES = 3  # in one region
_MAX_STEPS = 160  # of a pen, each way
_TURNS = np.linspace(-1, 1, 7)  # candidate turns of a step, as fractions of the largest
_LARGEST_TURN = np.deg2rad(55)  # in one step
_LARGEST_BEND = np.deg2rad(115)  # away from the first direction: a stroke curves, it does not spiral
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
        seed: the result depends only on the mask and the arguments.
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
    outside = (
        mask[(mask != ignore_label) & ((mask < 0) | (mask >= UNANNOTATED))] if mask.dtype != np.uint8 else mask[:0]
    )
    if outside.size or (ignore_label != UNANNOTATED and (mask == UNANNOTATED).any()):
        found = outside.flat[0] if outside.size else UNANNOTATED
        raise ValueError(f"mask values are classes 0..254 or the ignore value {ignore_label}, not {found}")
    classes: np.ndarray = np.where(mask == ignore_label, UNANNOTATED, mask).astype(np.uint8)

    regions = _Regions(classes)
    if len(regions.area) == 1:
        return np.full(classes.shape, UNANNOTATED, dtype=np.uint8)
    rng = np.random.default_rng(seed)
    pens = _Pens(regions, preference, rng)
    points, ends = pens.walk(rng)
    pixels, region = _shorten(regions.label, pens.region, points, ends, length, rng)
    return _draw(classes, regions.label, pixels, region, int(width))


class _Regions:
    """Connected regions of a mask, numbered from 1 in ``label`` ((H, W) int32, 0 = no class), as arrays over regions.

    ``clearance`` ((H, W) float32) is the distance to the region's boundary, 1 on its outermost pixels; the image's
    edge is a boundary too, since people keep away from it.
    """

    def __init__(self, mask: np.ndarray):
        height, width = mask.shape
        self.label: np.ndarray = np.zeros(mask.shape, np.int32)
        total = 0
        for class_id in np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256)[:UNANNOTATED]):
            here = (mask == class_id).view(np.uint8)
            x, y, w, h = cv2.boundingRect(here)
            count, part = cv2.connectedComponents(here[y : y + h, x : x + w], connectivity=4)
            part += total
            part *= here[y : y + h, x : x + w]
            self.label[y : y + h, x : x + w] += part
            total += count - 1
        flat = self.label.reshape(-1)
        self.area = np.bincount(flat, minlength=total + 1)
        small = np.uint16 if total < 1 << 16 else np.int32  # numpy sorts 16 bits by radix
        self.pixels = np.argsort(flat.astype(small), kind="stable")  # region after region, each row by row
        self.first = np.cumsum(self.area) - self.area
        column = np.tile(np.arange(width, dtype=np.int32), height)[self.pixels[self.area[0] :]]
        within = self.first[1:] - self.area[0]
        self.extent = np.zeros(total + 1)  # diagonal of the bounding box
        if total:
            rows = self.pixels[(self.first + self.area - 1)[1:]] // width - self.pixels[self.first[1:]] // width
            columns = np.maximum.reduceat(column, within) - np.minimum.reduceat(column, within)
            self.extent[1:] = np.hypot(rows + 1, columns + 1)

        inner = np.ones(mask.shape, bool)
        inner[[0, -1]] = False
        inner[:, [0, -1]] = False
        same = self.label[1:] == self.label[:-1]
        inner[1:] &= same
        inner[:-1] &= same
        same = self.label[:, 1:] == self.label[:, :-1]
        inner[:, 1:] &= same
        inner[:, :-1] &= same
        self.clearance = cv2.distanceTransform(inner.view(np.uint8), cv2.DIST_L2, 5) + 1


class _Pens:
    """A pen for every stroke of an image; all arrays are over the S strokes.

    Attributes:
        region: (S,) number of the region that the pen draws in.
        start: (S, 2) float row and column, in the padded maps ``label`` and ``clearance``.
        target: (S,) clearance that the pen keeps to.
    """

    def __init__(self, regions: _Regions, preference: float, rng: np.random.Generator):
        height, width = regions.label.shape
        area = regions.area[1:]
        strokes = 1 + np.minimum(area / (_LARGE_REGION * height * width), _MAX_STROKES - 1).astype(int)
        self.region = np.repeat(np.arange(1, len(regions.area)), strokes)
        self.count = len(self.region)

        # Where to start: of a few pixels of the region, one at a quantile of clearance that the preference asks for.
        # Several strokes of a region start in bands of rows of their own, so that they spread.
        band = np.arange(self.count) - np.searchsorted(self.region, self.region)
        pick = (band[:, None] + rng.random((self.count, _SAMPLES))) / np.repeat(strokes, strokes)[:, None]
        pick = (pick * regions.area[self.region, None]).astype(int)
        pick = regions.pixels[regions.first[self.region, None] + pick]
        pick = np.take_along_axis(pick, np.argsort(regions.clearance.reshape(-1)[pick], axis=1), axis=1)
        roomy = regions.clearance.reshape(-1)[pick[:, -1]]
        quantile = preference + (1 - preference) * rng.random(self.count)
        pick = pick[np.arange(self.count), np.minimum((quantile * _SAMPLES).astype(int), _SAMPLES - 1)]
        self.target = regions.clearance.reshape(-1)[pick]

        self.step = np.clip(0.5 * self.target, 1.2, 4.0)
        self.reach = _LOOK_AHEAD * self.step
        self.slack = np.maximum(self.step, 0.25 * self.target)
        steps = 0.5 * regions.extent[self.region] * rng.uniform(0.8, 1.2, self.count) / self.step
        self.steps = np.minimum(steps, _MAX_STEPS).astype(int)
        self.steps[regions.area[self.region] < _DOT_AREA] = 0
        self.floor = np.maximum(1, 0.6 * preference * self.target)
        # A hand turns wider where there is room.
        radius = np.maximum(np.maximum(1.2, 0.5 * self.target), 0.15 * roomy)
        self.turns = _TURNS * np.minimum(self.step / radius, _LARGEST_TURN)[:, None]

        self.margin = 2 + int(np.ceil(self.reach.max()))  # so that looking ahead needs no bounds check
        self.label = np.pad(regions.label, self.margin).reshape(-1)
        self.clearance = np.pad(regions.clearance, self.margin).reshape(-1)
        self.stride = width + 2 * self.margin
        # Truncation then rounds.
        self.start = np.stack(np.divmod(pick, width), axis=1).astype(float) + (self.margin + 0.5)

    def look(self, position, sine, cosine, distance):
        """Flat indices of the pixels that lie ``distance`` ahead: (P, 2), (P, T), (P, T), (P, D) -> (P, D, T)."""
        rows = (position[:, 0, None, None] + distance[:, :, None] * sine[:, None]).astype(np.int32)
        rows *= self.stride
        rows += (position[:, 1, None, None] + distance[:, :, None] * cosine[:, None]).astype(np.int32)
        return rows

    def headings(self, rng: np.random.Generator) -> np.ndarray:
        """The direction of each pen, (S,) radians, in which the clearance lasts both ways."""
        axis = rng.uniform(0, np.pi, (self.count, 1)) + np.linspace(0, np.pi, 12, endpoint=False)
        both_ways = np.stack([self.reach, -self.reach], axis=1)
        ahead = self.look(self.start, np.sin(axis), np.cos(axis), both_ways)
        inside = self.label[ahead] == self.region[:, None, None]
        misfit = np.abs(self.clearance[ahead] * inside - self.target[:, None, None]).sum(axis=1)
        return axis[np.arange(self.count), misfit.argmin(axis=1)]

    def walk(self, rng: np.random.Generator):
        """The whole strokes (length 1): points end to end (K, 2) float row and column, each stroke's end in them (S,).

        Pens 0..S-1 go forward, S further ones backward.
        """
        both = np.concatenate([np.arange(self.count)] * 2)
        position = self.start[both]
        heading = self.headings(rng)
        heading = np.concatenate([heading, heading + np.pi])
        first_heading = heading.copy()
        tremor = np.zeros(2 * self.count)
        track = np.zeros((int(self.steps.max(initial=0)) + 1, 2 * self.count, 2))
        track[0] = position
        done = np.zeros(2 * self.count, int)
        alive = np.flatnonzero(self.steps[both] > 0)
        for number in range(1, len(track)):
            s = both[alive]
            shake = 0.9 * tremor[alive] + 0.25 * rng.standard_normal(len(alive))
            here, turn, goes = self._move(s, position[alive], heading[alive], shake)
            direction = heading[alive] + turn
            goes &= np.abs(direction - first_heading[alive]) <= _LARGEST_BEND
            alive = alive[goes]
            heading[alive], tremor[alive], done[alive] = direction[goes], shake[goes], number
            position[alive] = track[number, alive] = here[goes]
            alive = alive[number < self.steps[both[alive]]]
            if len(alive) == 0:
                break
        track -= self.margin

        # Backward track reversed, then the forward one: the rows that are a stroke's stand together in its column.
        whole = np.concatenate([track[:0:-1, self.count :], track[:, : self.count]])
        place = np.arange(len(whole))[:, None] - (len(track) - 1)
        mine = (place >= -done[self.count :]) & (place <= done[: self.count])
        return whole.transpose(1, 0, 2)[mine.T], np.cumsum(mine.sum(axis=0))

    def _move(self, s, here, heading, shake):
        """A step of pens ``s`` that are ``here`` (P, 2): where they come to, how they turn, whether they may."""
        sine, cosine = np.sin(heading)[:, None], np.cos(heading)[:, None]
        sine_of_turns, cosine_of_turns = np.sin(self.turns[s]), np.cos(self.turns[s])
        sine, cosine = sine * cosine_of_turns + cosine * sine_of_turns, cosine * cosine_of_turns - sine * sine_of_turns
        distance = np.stack([0.5 * self.step[s], self.step[s], self.reach[s]], axis=1)
        ahead = self.look(here, sine, cosine, distance)
        inside = self.label[ahead] == self.region[s, None, None]
        fits = inside[:, 0] & inside[:, 1]
        cost = np.abs(self.clearance[ahead[:, 2]] * inside[:, 2] - self.target[s, None])
        cost /= self.slack[s, None]
        cost += (_TURNS - shake[:, None]) ** 2
        cost[~fits] = np.inf
        chosen = np.arange(len(s)), cost.argmin(axis=1)
        here = here + self.step[s, None] * np.stack([sine[chosen], cosine[chosen]], axis=1)
        roomy = self.clearance[ahead[:, 1][chosen]] >= self.floor[s]
        return here, self.turns[s, chosen[1]], fits[chosen] & roomy


def _shorten(label, region, points, ends, length, rng):
    """The pixels (K, 2) of the middle ``length`` of every stroke, all in their region, and the region of each (K,)."""

    def inside(pixels, region):
        return label[pixels[:, 0], pixels[:, 1]] == region

    stroke = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    middle = np.flatnonzero(stroke[2:] == stroke[:-2]) + 1
    smooth = 0.25 * points[middle - 1] + 0.5 * points[middle] + 0.25 * points[middle + 1]
    points, smooth = points.astype(np.int64), smooth.astype(np.int64)
    keeps = inside(smooth, region[stroke[middle]])
    points[middle[keeps]] = smooth[keeps]

    count = segment_lengths(points)
    count[ends[:-1] - 1] = 1  # from one stroke to the next nothing is drawn but the former's last point
    pixels = np.concatenate([segment_pixels(points, count), points[-1:]])
    stroke = np.repeat(stroke, np.append(count, 1))
    keeps = inside(pixels, region[stroke])  # all points are, what lies between two may not be
    pixels, stroke = pixels[keeps], stroke[keeps]

    size = np.bincount(stroke)
    place = np.arange(len(stroke)) - (np.cumsum(size) - size)[stroke]
    first = rng.uniform(0.25, 0.75, len(ends)) * (1 - length)  # a shorter stroke lies within a longer one
    first, last = (np.rint(end * (size - 1))[stroke] for end in (first, first + length))
    kept = (first <= place) & (place <= last)
    return pixels[kept], region[stroke[kept]]


def _draw(mask, label, pixels, region, width):
    """Stamp a round brush on the pixels, but never outside the pixel's region: (H, W) uint8."""
    brush = np.argwhere(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))) - width // 2
    label = np.pad(label, width)  # so that stamping needs no bounds check
    stride = label.shape[1]
    place = (pixels + width) @ (stride, 1)
    place = place[:, None] + brush @ (stride, 1)
    place = place[label.reshape(-1)[place] == region[:, None]]
    drawn = np.zeros(label.shape, bool)
    drawn.reshape(-1)[place] = True
    return np.where(drawn[width:-width, width:-width], mask, UNANNOTATED).astype(np.uint8)
