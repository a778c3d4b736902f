"""PASCAL VOC 2012 with the augmented masks (SBD) and ScribbleSup's scribbles."""

from __future__ import annotations

import os
import sys

from ...scribbles.vocabulary import VOC_NAMES
from ...utils import paths
from ...utils.errors import BLPSegError
from ...utils.files import write_bytes_atomic
from .splits import Split, index_folder, read_names, register_split, require_folder, voc_colors

__all__ = ["CLASSES", "TRAINAUG_COUNT", "prepare"]

TRAINAUG_COUNT = 10582  # METHOD.md section 8

CLASSES = VOC_NAMES  # as the scribble files spell them

_VOC = "VOCdevkit/VOC2012"
_FETCH = (
    "set DETECTRON2_DATASETS to where the data lies; `python datasets/prepare_pascal_voc.py` says what it "
    "expects there and where it comes from"
)
_CHECK = "run `python datasets/prepare_pascal_voc.py`, which checks the tree and writes trainaug.txt"
_REMEDIES = {
    "images": _FETCH,
    "masks": _FETCH,
    "names": _CHECK,
    "scribbles": "run `python datasets/prepare_scribbles.py --xml VOCdevkit/scribble_annotation/pascal_2012 --output "
    "VOCdevkit/scribble_annotation/pascal_2012_label --vocabulary voc` below the data root",
}

for _split in (
    Split(
        name="voc_2012_scribble_trainaug",
        images=f"{_VOC}/JPEGImages",
        scribbles="VOCdevkit/scribble_annotation/pascal_2012_label",
        masks=f"{_VOC}/SegmentationClassAug",
        names=f"{_VOC}/ImageSets/Segmentation/trainaug.txt",
        remedies=_REMEDIES,
    ),
    Split(
        name="voc_2012_val",
        images=f"{_VOC}/JPEGImages",
        masks=f"{_VOC}/SegmentationClassAug",
        names=f"{_VOC}/ImageSets/Segmentation/val.txt",
        remedies=_REMEDIES | {"names": _FETCH},
    ),
):
    register_split(_split, CLASSES, voc_colors(len(CLASSES)))


def prepare(root: str) -> int:
    """Check the tree of METHOD.md section 8 and write ``ImageSets/Segmentation/trainaug.txt``.

    The list holds every name in SegmentationClassAug that is not in val.txt, sorted.

    Args:
        root: the folder VOC2012.

    Returns:
        Exit status: 1 if a mask has no image or an image of val.txt no mask; each is named on stderr.

    Raises:
        BLPSegError: a folder or val.txt is missing.
    """
    help_text = "datasets/README.md, 'PASCAL VOC 2012', tells where it comes from"
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        require_folder(os.path.join(root, folder), help_text)
    images = index_folder(os.path.join(root, "JPEGImages"))
    masks = index_folder(os.path.join(root, "SegmentationClassAug"))
    lists = os.path.join(root, "ImageSets", "Segmentation")
    val = read_names(os.path.join(lists, "val.txt"), help_text)

    problems = [f"{path}: no image {stem} in JPEGImages" for stem, path in masks.items() if stem not in images]
    problems += [f"{lists}/val.txt: {stem} has no mask in SegmentationClassAug" for stem in val if stem not in masks]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)

    names = sorted(set(masks) - set(val))
    if not names:
        raise BLPSegError(f"{root}/SegmentationClassAug: no mask beside those of val.txt; {help_text}")
    path = os.path.join(lists, "trainaug.txt")
    content = "".join(f"{name}\n" for name in names)
    current = None
    if paths.isfile(path):
        with paths.open_file(path) as file:
            current = file.read()
    if current != content:
        write_bytes_atomic(path, content.encode())
    print(f"{path}: {len(names)} names, {'up to date' if current == content else 'written'}")
    if len(names) != TRAINAUG_COUNT:
        print(
            f"warning: {TRAINAUG_COUNT} names make the usual training set, here are {len(names)}; "
            f"is SegmentationClassAug complete ({len(masks)} masks, usually 12031)?",
            file=sys.stderr,
        )
    return 1 if problems else 0
