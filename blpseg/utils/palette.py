"""Class colours that are easy to distinguish."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

# Background, then the colours of Okabe & Ito, "Color Universal Design" (2008), which people with any kind of colour
# blindness tell apart.
_FIRST = [(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178),
          (240, 228, 66)]  # fmt: skip
_KEPT_FREE = [(224, 224, 192), (191, 191, 191)]  # pictures show "no label" so
_LEVELS = np.linspace(0, 255, 9).round().astype(np.uint8)  # of each channel, to choose from


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """(R, G, B) of ``count`` classes (up to 254), background first; more classes leave the first colours as they are.

    After the eighth each colour is the one farthest, in CIELAB, from all before it.
    """
    return list(_colors(count))


@lru_cache(maxsize=8)
def _colors(count: int) -> tuple[tuple[int, int, int], ...]:
    candidates = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS, indexing="ij"), -1).reshape(-1, 3)
    places, taken = _lab(candidates), _lab(np.array([*_FIRST, *_KEPT_FREE], np.uint8))
    distance = np.linalg.norm(places[:, None] - taken, axis=2).min(axis=1)
    colors = list(_FIRST[:count])
    while len(colors) < count:
        best = int(distance.argmax())
        red, green, blue = candidates[best].tolist()
        colors.append((red, green, blue))
        distance = np.minimum(distance, np.linalg.norm(places - places[best], axis=1))
    return tuple(colors)


def _lab(colors: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(colors[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
