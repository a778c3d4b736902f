#!/usr/bin/env python
"""Make the generated data set, splits synthetic_scribble_train and synthetic_val.

Six kinds of object lie on a textured ground and over each other. Each kind has a spacious body and what annotators
avoid: corners, limbs a few pixels thin, holes. A kind prefers a hue and a texture, but in part of the objects either
is anything, and the ground takes all of them: colour alone tells little, shape and texture together tell most.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence

import cv2
import numpy as np

from blpseg.data.datasets.synthetic import CLASSES, FOLDER
from blpseg.scribbles import simulate_scribble
from blpseg.utils.cli import add_work_flags, count, fraction, run_command
from blpseg.utils.errors import BLPSegError
from blpseg.utils.files import write_json, write_png_atomic
from blpseg.utils.parallel import process_files
from blpseg.utils.paths import data_root, open_file

METADATA = "metadata.json"
_GENERATOR = "blpseg make_synthetic 1"  # count up when the same settings give other pictures
_SPLITS = ("train", "val")

_OWN_TEXTURE = 0.85  # share of objects with the texture of their kind
# Differences in value between a texture's shades; the ranges overlap.
_GROUND_CONTRAST, _OBJECT_CONTRAST = (0.08, 0.22), (0.18, 0.4)
# Where colours (do not overlap, overlap): deviation of a kind's hue on a circle of 1, saturation of ground and objects.
_HUE_SPREAD = 0.02, 0.07
_MOST_GROUND_SATURATION = 0.25, 0.55
_LEAST_OBJECT_SATURATION = 0.5, 0.3

EXAMPLE = """
examples:
  python datasets/make_synthetic.py
  python datasets/make_synthetic.py --size 96 160 --train 1000 --preference 1
  python datasets/make_synthetic.py --shuffle-scribbles --output /tmp/control/synthetic
      then train with DETECTRON2_DATASETS=/tmp/control: what remains of the score is not learned from scribbles
"""


def draw_scene(
    rng: np.random.Generator, height: int, width: int, own_hue: float = 0.7, colour_overlap: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Args:
        rng: the scene depends on it and the other arguments alone.
        height, width: in pixels, at least 32.
        own_hue: share of objects in the hue of their kind, 0..1; the others have any.
        colour_overlap: 0..1. At 1 neighbouring kinds share hues, and ground and objects saturations; at 0 the kinds'
            own hues lie apart and all ground is paler than any object. The masks do not depend on it.

    Returns:
        image (H, W, 3) uint8 RGB and mask (H, W) uint8, classes as in ``blpseg.data.datasets.synthetic``.
    """
    hue_spread, most, least = (
        (1 - colour_overlap) * apart + colour_overlap * overlapping
        for apart, overlapping in (_HUE_SPREAD, _MOST_GROUND_SATURATION, _LEAST_OBJECT_SATURATION)
    )
    ground_look, object_look = ((0.05, most), _GROUND_CONTRAST), ((least, 0.9), _OBJECT_CONTRAST)
    mask = np.zeros((height, width), np.uint8)
    ground = rng.choice(list(_TEXTURES), size=2, replace=False)
    image = _paint(rng, height, width, ground[0], rng.random(), *ground_look)
    if rng.random() < 0.5:  # a second ground, behind a wavy horizon
        horizon = height * rng.uniform(0.25, 0.75) + height * 0.06 * np.sin(
            np.arange(width) * rng.uniform(2, 9) / width + rng.uniform(0, 6)
        )
        below = np.arange(height)[:, None] > horizon
        image = np.where(below[..., None], _paint(rng, height, width, ground[1], rng.random(), *ground_look), image)

    textures = list(_TEXTURES)
    for _ in range(rng.integers(2, 6)):
        kind = int(rng.integers(1, len(CLASSES)))
        shape = _place(rng, _SHAPES[CLASSES[kind]](rng), height, width)
        own = (kind - 1) / (len(CLASSES) - 1)
        hue = rng.normal(own, hue_spread) if rng.random() < own_hue else rng.random()
        texture = textures[kind - 1] if rng.random() < _OWN_TEXTURE else rng.choice(textures)
        paint = _paint(rng, height, width, texture, hue, *object_look)
        soft = cv2.GaussianBlur(shape.astype(np.float32), (3, 3), 0.6)[..., None]
        image = image + soft * (paint - image)
        mask[shape > 0] = kind

    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    light = 1 + 0.15 * (rows * rng.uniform(-1, 1) + columns * rng.uniform(-1, 1))
    image = image * light[..., None] + rng.normal(0, 0.025, (height, width, 3))
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), mask


def _paint(rng: np.random.Generator, height: int, width: int, texture: str, hue: float, saturation, contrast):
    """(H, W, 3) in 0..1: a texture between two shades of a hue."""
    pattern = _TEXTURES[texture](rng, height, width)[..., None]
    value = rng.uniform(0.25, 0.6)
    shades = np.array(
        [
            [(hue + rng.normal(0, 0.02)) % 1, rng.uniform(*saturation), value],
            [(hue + rng.normal(0, 0.02)) % 1, rng.uniform(*saturation), value + rng.uniform(*contrast)],
        ],
        np.float32,
    )
    shades[:, 0] *= 360
    dark, bright = cv2.cvtColor(shades[None], cv2.COLOR_HSV2RGB)[0]
    return dark + pattern * (bright - dark)


def _coordinates(rng, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates turned by a random angle and shifted by a random phase."""
    angle, rows, columns = rng.uniform(0, np.pi), *np.mgrid[0:height, 0:width]
    along = columns * np.cos(angle) + rows * np.sin(angle)
    across = rows * np.cos(angle) - columns * np.sin(angle)
    return along + rng.uniform(0, 20), across + rng.uniform(0, 20)


def _stripes(rng, height, width):
    along, _ = _coordinates(rng, height, width)
    return 0.5 + 0.5 * np.sin(along * 2 * np.pi / rng.uniform(5, 9))


def _checks(rng, height, width):
    along, across = _coordinates(rng, height, width)
    side = rng.uniform(4, 7)
    return ((along // side + across // side) % 2).astype(np.float64)


def _dots(rng, height, width):
    along, across = _coordinates(rng, height, width)
    pitch = rng.uniform(6, 9)
    distance = np.hypot(along % pitch - pitch / 2, across % pitch - pitch / 2)
    return (distance < 0.3 * pitch).astype(np.float64)


def _noise(rng, height, width, sigma):
    noise = cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), sigma)
    return np.clip(0.5 + 0.25 * noise / noise.std(), 0, 1)


def _clouds(rng, height, width):
    return _noise(rng, height, width, rng.uniform(4, 7))


def _speckle(rng, height, width):
    return _noise(rng, height, width, rng.uniform(0.7, 1.2))


def _waves(rng, height, width):
    along, across = _coordinates(rng, height, width)
    bend = rng.uniform(2, 4) * np.sin(across * 2 * np.pi / rng.uniform(12, 20))
    return 0.5 + 0.5 * np.sin((along + bend) * 2 * np.pi / rng.uniform(10, 14))


# In the order of the kinds that prefer them.
_TEXTURES = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "clouds": _clouds,
    "speckle": _speckle,
    "waves": _waves,
}


# A shape is a list of polygons (K, 2) about the origin with radius about 1, each filled (True) or cut out (False).


def _circle(radius: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _disc(rng):
    """A disc with whiskers, sometimes with a small hole."""
    parts = [(_circle(0.8), True)]
    parts += [(_turn(_box(0.7, -0.05, 1.35, 0.05), angle), True) for angle in rng.uniform(0, 2 * np.pi, 3)]
    if rng.random() < 0.5:
        parts.append((_circle(0.22, *rng.uniform(-0.3, 0.3, 2)), False))
    return parts


def _star(rng):
    points = int(rng.integers(5, 8))
    angle = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2, rng.uniform(0.4, 0.5), 1.15)
    return [(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), True)]


def _cross(rng):
    """A wide bar across a thin one."""
    wide, thin = rng.uniform(0.3, 0.4), rng.uniform(0.08, 0.14)
    return [(_box(-1, -wide, 1, wide), True), (_box(-thin, -1.2, thin, 1.2), True)]


def _ring(rng):
    return [(_circle(1), True), (_circle(rng.uniform(0.5, 0.65)), False)]


def _comb(rng):
    """A block with thin teeth."""
    teeth = np.linspace(-0.92, 0.92, int(rng.integers(4, 7)))
    return [(_box(-1, -0.9, 1, 0), True)] + [(_box(x - 0.07, -0.1, x + 0.07, 0.95), True) for x in teeth]


def _leaf(rng):
    """A lens with pointed ends, a stalk and a slit."""
    x = np.linspace(-1, 1, 24)
    y = rng.uniform(0.5, 0.65) * np.cos(x * np.pi / 2) ** 0.8
    outline = np.concatenate([np.stack([x, y], 1), np.stack([x, -y], 1)[::-1]])
    return [(outline, True), (_box(0.9, -0.05, 1.7, 0.05), True), (_box(-0.6, -0.05, 0.2, 0.05), False)]


_SHAPES = {"disc": _disc, "star": _star, "cross": _cross, "ring": _ring, "comb": _comb, "leaf": _leaf}


def _place(rng: np.random.Generator, parts: list, height: int, width: int) -> np.ndarray:
    """Draw a shape with random position, size, stretch and turn: (H, W) uint8 of 0 and 1."""
    canvas = np.zeros((height, width), np.uint8)
    stretch = np.array([1.0, rng.uniform(0.75, 1.0)]) * min(height, width) * rng.uniform(0.17, 0.32)
    centre = np.array([width, height]) * rng.uniform(0.12, 0.88, 2)
    angle = rng.uniform(0, 2 * np.pi)
    for points, filled in parts:
        pixels = _turn(points * stretch, angle) + centre
        cv2.fillPoly(canvas, [np.round(pixels).astype(np.int32)], int(filled))
    return canvas


def make_synthetic(
    output: str,
    *,
    size: Sequence[int] = (128, 128),
    train: int = 400,
    val: int = 100,
    seed: int = 0,
    own_hue: float = 0.7,
    colour_overlap: float = 1.0,
    preference: float = 0.5,
    length: float = 1.0,
    scribble_width: int = 3,
    shuffle_scribbles: bool = False,
    workers: int | None = None,
) -> bool:
    """Write the data set: ``images/{train,val}``, ``masks/{train,val}``, ``scribbles/train`` and metadata.json.

    An interrupted run goes on where it was; with other settings than the folder was made with all is made anew.

    Args:
        output: folder; a folder that this function did not make is refused.
        size: (height, width) of the images.
        train, val: counts of images.
        seed: same seed and settings, same files.
        own_hue, colour_overlap: of :func:`draw_scene`; the larger the first and the smaller the second, the easier the
            classes are to tell apart.
        preference, length, scribble_width: of :func:`blpseg.data.scribbles.simulate_scribble`.
        shuffle_scribbles: every training image gets another's scribble: a control that nothing can be learned from.
        workers: processes.

    Returns:
        False where everything was there already.

    Raises:
        BLPSegError: a setting is out of range, or the folder holds something else.
    """
    settings = {
        "generator": _GENERATOR,
        "size": [int(side) for side in size],
        "train": train,
        "val": val,
        "seed": seed,
        "own_hue": own_hue,
        "colour_overlap": colour_overlap,
        "preference": preference,
        "length": length,
        "scribble_width": scribble_width,
        "shuffle_scribbles": shuffle_scribbles,
        "classes": CLASSES,
    }
    _check(settings)
    _prepare_folder(output, settings)
    tasks = [task for task in _tasks(output, settings) if not all(map(os.path.isfile, _paths(task).values()))]
    if not tasks:
        return False
    report = process_files(_write_scene, tasks, workers, "scenes")
    if report.failed:
        raise BLPSegError(report.failed[0])
    return True


def _check(settings: dict) -> None:
    height, width = settings["size"]
    train, val = settings["train"], settings["val"]
    if min(height, width) < 32 or min(train, val) < 1 or (settings["shuffle_scribbles"] and train < 2):
        raise BLPSegError(
            f"sizes start at 32 pixels, counts at 1 (2 to shuffle); got {height} x {width}, {train} train, {val} val"
        )
    shares = [settings[key] for key in ("own_hue", "colour_overlap", "preference", "length")]
    if not (all(0 <= share <= 1 for share in shares) and settings["scribble_width"] >= 1 and settings["seed"] >= 0):
        raise BLPSegError(
            "own hue, colour overlap, preference and length lie in 0..1, width starts at 1, the seed at 0"
        )


def _tasks(output: str, settings: dict) -> list[tuple]:
    """Folder, settings, split, number of the image, and number of the image that gets its scribble."""
    train, seed = settings["train"], settings["seed"]
    targets = np.arange(train)
    if settings["shuffle_scribbles"]:
        order = np.random.default_rng((seed, len(_SPLITS))).permutation(train)
        targets[order] = np.roll(order, 1)  # one cycle: none keeps its own
    tasks = [(output, settings, "val", i, i) for i in range(settings["val"])]
    return tasks + [(output, settings, "train", i, int(targets[i])) for i in range(train)]


def _paths(task: tuple) -> dict[str, str]:
    output, _, split, index, target = task
    paths = {part: os.path.join(output, part, split, f"{index:06d}.png") for part in ("images", "masks")}
    if split == "train":
        paths["scribbles"] = os.path.join(output, "scribbles", split, f"{target:06d}.png")
    return paths


def _write_scene(task: tuple) -> bool:
    _, settings, split, index, _ = task
    paths = _paths(task)
    rng = np.random.default_rng((settings["seed"], _SPLITS.index(split), index))
    image, mask = draw_scene(rng, *settings["size"], settings["own_hue"], settings["colour_overlap"])
    write_png_atomic(paths["images"], image)
    write_png_atomic(paths["masks"], mask)
    if "scribbles" in paths:
        scribble = simulate_scribble(
            mask,
            preference=settings["preference"],
            length=settings["length"],
            width=settings["scribble_width"],
            seed=int(rng.integers(2**31)),
        )
        write_png_atomic(paths["scribbles"], scribble)
    return True


def _prepare_folder(output: str, settings: dict) -> None:
    """Leave only files made with these settings in the folder, and the settings beside them."""
    path = os.path.join(output, METADATA)
    made_with = None
    if os.path.isfile(path):
        with open_file(path) as file:
            try:
                made_with = json.load(file)
            except json.JSONDecodeError as error:
                raise BLPSegError(f"{path}: not JSON ({error}); remove the folder to have it made anew") from error
    elif os.path.isdir(output) and os.listdir(output):
        raise BLPSegError(f"{output}: not empty and without {METADATA}, so not made here; choose another --output")
    if made_with == settings:
        return
    if made_with is not None:
        if not str(made_with.get("generator", "")).startswith("blpseg make_synthetic"):
            raise BLPSegError(f"{path}: not written by make_synthetic; choose another --output")
        for part in ("images", "masks", "scribbles"):
            shutil.rmtree(os.path.join(output, part), ignore_errors=True)
    write_json(path, settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.path.join(data_root(), FOLDER)
    parser.add_argument("--output", default=default, help=f"folder to write (default: {default})")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[128], help="side, or height and width, in pixels (default: 128)"
    )
    parser.add_argument("--train", type=count, default=400, help="training images (default: 400)")
    parser.add_argument("--val", type=count, default=100, help="validation images (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data set (default: 0)")
    parser.add_argument(
        "--own-hue",
        type=fraction,
        default=0.7,
        help="share of objects in the hue of their kind: the more, the easier to tell apart (default: 0.7)",
    )
    parser.add_argument(
        "--colour-overlap",
        type=fraction,
        default=1.0,
        help="1: kinds and ground share colours, 0: hue and saturation tell most of them apart (default: 1)",
    )
    parser.add_argument(
        "--preference",
        type=fraction,
        default=0.5,
        help="0 scribbles anywhere in a region, 1 only in its spacious middle (default: 0.5)",
    )
    parser.add_argument("--length", type=fraction, default=1.0, help="of a stroke, 0..1 of the whole one (default: 1)")
    parser.add_argument("--width", type=count, default=3, help="of a stroke, in pixels (default: 3)")
    parser.add_argument("--shuffle-scribbles", action="store_true", help="permute the scribbles among the images")
    add_work_flags(parser)
    arguments = parser.parse_args()
    if len(arguments.size) > 2:
        parser.error("--size takes one or two numbers")

    made = make_synthetic(
        arguments.output,
        size=(arguments.size * 2)[:2],
        train=arguments.train,
        val=arguments.val,
        seed=arguments.seed,
        own_hue=arguments.own_hue,
        colour_overlap=arguments.colour_overlap,
        preference=arguments.preference,
        length=arguments.length,
        scribble_width=arguments.width,
        shuffle_scribbles=arguments.shuffle_scribbles,
        workers=arguments.workers,
    )
    state = "made" if made else "up to date"
    print(f"{arguments.output}: {arguments.train} training and {arguments.val} validation images, {state}")


if __name__ == "__main__":
    run_command(main)
