"""Pictures of images, labels, predictions and annotation probabilities. All images are RGB uint8.

A pixel without a label never looks like a class: over an image it is washed out and grey, alone it is cream.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .utils.files import write_bytes_atomic

if TYPE_CHECKING:
    from detectron2.data import Metadata
    from matplotlib.figure import Figure

UNLABELLED_COLOR = (224, 224, 192)  # cream, as PASCAL VOC shows void
_WASHED_OUT_COLOR = (191, 191, 191)  # what an overlay makes of middle grey
_PADDING_COLOR = (70, 74, 110)
_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_FONT_SIZE = 14
_LEAST_SIDE = 256  # smaller pictures are enlarged for the eye


def colorize(label: np.ndarray, colors: Sequence[Sequence[int]]) -> np.ndarray:
    """Class colours: (H, W) integers -> (H, W, 3) uint8; values outside 0..len(colors)-1 become cream."""
    table = np.array([*colors, UNLABELLED_COLOR], np.uint8)
    return table[_known(label, len(colors))]


def thicken(label: np.ndarray, radius: int, num_classes: int) -> np.ndarray:
    """Widen the strokes of a label (H, W) uint8: every pixel within ``radius`` pixels of one below ``num_classes``
    takes the class of the nearest."""
    empty = (label >= num_classes).astype(np.uint8)
    if radius <= 0 or empty.all():
        return label
    distance, nearest = cv2.distanceTransformWithLabels(empty, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    stroke = empty == 0
    values = np.zeros(int(nearest.max()) + 1, label.dtype)
    values[nearest[stroke]] = label[stroke]
    return np.where(distance <= radius, values[nearest], label)


def overlay(image: np.ndarray, label: np.ndarray, colors: Sequence[Sequence[int]], alpha: float = 0.6) -> np.ndarray:
    """Lay class colours over an image; where there is no label the image is washed out and grey.

    (H, W, 3) uint8 RGB, (H, W) integers, C RGB triples -> (H, W, 3) uint8. Values outside 0..C-1 are no label;
    ``alpha`` is the opacity of the colours.
    """
    known = _known(label, len(colors)) < len(colors)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    mixed = np.where(known[..., None], (1 - alpha) * image + alpha * colorize(label, colors), 0.5 * grey + 0.5 * 255)
    return mixed.round().astype(np.uint8)


def labelled_overlay(
    image: np.ndarray, label: np.ndarray, metadata: Metadata, *, present: Sequence[int] | None = None
) -> np.ndarray:
    """An :func:`overlay` in the colours of ``metadata`` above a legend; small pictures are enlarged.

    The legend has the classes in ``present``, by default those that occur. (H, W, 3), (H, W) -> (H', W', 3) uint8.
    """
    names, colors = metadata.stuff_classes, metadata.stuff_colors
    picture = overlay(image, label, colors)
    picture = _to_height(picture, picture.shape[0] * max(1, round(2 * _LEAST_SIDE / min(label.shape))))
    shown = _present(len(names), label) if present is None else present
    return _below([picture, legend(names, colors, picture.shape[1], shown, _no_label(len(names), label))])


def heat_map(values: np.ndarray) -> np.ndarray:
    """(H, W) numbers -> (H, W, 3) uint8, dark for 0 to bright for 1."""
    scaled = np.clip(np.asarray(values, np.float32), 0, 1)
    return cv2.applyColorMap((scaled * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]


def legend(
    names: Sequence[str],
    colors: Sequence[Sequence[int]],
    width: int,
    present: Sequence[int] | None = None,
    others: Mapping[str, Sequence[int]] | None = None,
) -> np.ndarray:
    """Swatches with names in as many rows as ``width`` pixels ask for, larger in large pictures.

    Args:
        names, colors: of the C classes.
        width: of the result in pixels; a name that is wider still makes it wider.
        present: classes to show; by default all.
        others: name -> RGB of what is no class; by default "no label" in cream.

    Returns:
        (h, width or more, 3) uint8.
    """
    chosen = range(len(names)) if present is None else present
    others = {"no label": UNLABELLED_COLOR} if others is None else others
    entries = [(names[c], colors[c]) for c in chosen] + list(others.items())
    size = max(_FONT_SIZE, width // 120)
    font, line, swatch = _font(size), round(1.6 * size), size
    x, y, right, spots = 8, 4, width, []
    for name, color in entries:
        needed = swatch + 5 + int(font.getlength(name)) + size
        if x > 8 and x + needed > width:
            x, y = 8, y + line
        spots.append((x, y, name, color))
        x += needed
        right = max(right, x - size + 6)
    picture = Image.new("RGB", (right, y + line + 2), _PAPER)
    draw = ImageDraw.Draw(picture)
    for x, y, name, color in spots:
        draw.rectangle((x, y + 3, x + swatch, y + 3 + swatch), fill=tuple(color), outline=_INK)
        draw.text((x + swatch + 5, y + 1), name, fill=_INK, font=font)
    return np.asarray(picture)


def panels(images: Mapping[str, np.ndarray], columns: int | None = None) -> np.ndarray:
    """Titled pictures, (H, W, 3) uint8, in rows of ``columns`` (by default one row), all at the height of the first."""
    items = list(images.items())
    height = max(_LEAST_SIDE, items[0][1].shape[0])
    cells = [_below([_words(title), _to_height(image, height)]) for title, image in items]
    columns = columns or len(cells)
    rows = [_beside(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return _below(rows)


def result_panels(
    image: np.ndarray,
    metadata: Metadata,
    *,
    scribble: np.ndarray | None = None,
    over: Mapping[str, np.ndarray] | None = None,
    heat_maps: Mapping[str, np.ndarray] | None = None,
    maps: Mapping[str, np.ndarray] | None = None,
    padding: np.ndarray | None = None,
    columns: int | None = None,
) -> np.ndarray:
    """An image and what is known of it side by side, above a legend of the classes that occur.

    Args:
        image: (H, W, 3) uint8 RGB.
        metadata: with ``stuff_classes`` and ``stuff_colors``.
        scribble: (H, W) class map; other values are no label. Strokes are thickened.
        over: title -> (H, W) class map laid over the image.
        heat_maps: title -> (H, W) numbers in 0..1.
        maps: title -> (H, W) class map.
        padding: (H, W) bool, pixels outside the image; they get a colour of their own.
        columns: see :func:`panels`.

    Returns:
        (H', W', 3) uint8.
    """
    names, colors = metadata.stuff_classes, metadata.stuff_colors
    over, heat_maps, maps = over or {}, heat_maps or {}, maps or {}
    shown, laid = {"image": image}, list(over.values())
    if scribble is not None:
        thick = thicken(scribble, max(1, round(min(scribble.shape) / 200)), len(colors))
        shown["scribble"] = overlay(image, thick, colors, alpha=1.0)
        laid.append(scribble)
    shown |= {title: overlay(image, label, colors) for title, label in over.items()}
    shown |= {title: heat_map(values) for title, values in heat_maps.items()}
    shown |= {title: colorize(label, colors) for title, label in maps.items()}
    others = _no_label(len(names), *laid, color=_WASHED_OUT_COLOR) | _no_label(len(names), *maps.values())
    if padding is not None and padding.any():
        others["padding"] = _PADDING_COLOR
        shown = {title: np.where(padding[..., None], np.uint8(_PADDING_COLOR), i) for title, i in shown.items()}
    grid = panels(shown, columns)
    present = _present(len(names), *laid, *maps.values())
    parts = [grid, legend(names, colors, grid.shape[1], present, others)]
    if heat_maps:
        ramp = np.full((24, 160, 3), _PAPER, np.uint8)
        ramp[4:20] = heat_map(np.linspace(0, 1, 160)[None])
        parts.append(_beside([_words(f"{', '.join(heat_maps)}: 0"), ramp, _words("1")], gap=0))
    return _below(parts)


def write_figure(path: str, figure: Figure) -> None:
    """Write a figure of matplotlib's as PNG in one step."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes_atomic(path, content.getvalue())


def _no_label(num_classes: int, *labels: np.ndarray, color=UNLABELLED_COLOR) -> dict:
    """An entry for the legend where a pixel of the labels is no class."""
    lacking = any((_known(label, num_classes) == num_classes).any() for label in labels)
    return {"no label": color} if lacking else {}


def _present(num_classes: int, *labels: np.ndarray) -> list[int]:
    values = {int(v) for label in labels for v in np.unique(label)}
    return sorted(v for v in values if 0 <= v < num_classes)


def _known(label: np.ndarray, num_classes: int) -> np.ndarray:
    label = np.asarray(label)
    return np.where((label >= 0) & (label < num_classes), label, num_classes).astype(np.intp)


@lru_cache(maxsize=4)
def _font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont:
    import matplotlib

    # It brings a font with Latin, Greek and Cyrillic letters; the system needs none.
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _to_height(image: np.ndarray, height: int) -> np.ndarray:
    if image.shape[0] == height:
        return image
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    # Whole pixels stay visible when a small picture grows.
    method = cv2.INTER_NEAREST_EXACT if height > image.shape[0] else cv2.INTER_AREA
    return cv2.resize(image, (width, height), interpolation=method)


def _words(text: str) -> np.ndarray:
    line = Image.new("RGB", (int(_font().getlength(text)) + 8, 24), _PAPER)
    ImageDraw.Draw(line).text((4, 3), text, fill=_INK, font=_font())
    return np.asarray(line)


def _beside(images: Sequence[np.ndarray], gap: int = 6) -> np.ndarray:
    height = max(image.shape[0] for image in images)
    padded = [np.pad(i, ((0, height - i.shape[0]), (0, gap), (0, 0)), constant_values=_PAPER[0]) for i in images]
    return np.concatenate(padded, 1)[:, : -gap or None]


def _below(images: Sequence[np.ndarray]) -> np.ndarray:
    width = max(image.shape[1] for image in images)
    padded = [np.pad(i, ((0, 0), (0, width - i.shape[1]), (0, 0)), constant_values=_PAPER[0]) for i in images]
    return np.concatenate(padded, 0)
