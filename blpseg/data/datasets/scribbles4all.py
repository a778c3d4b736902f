"""Scribbles for All: made scribbles for PASCAL VOC, Cityscapes and ADE20K (Boettcher et al., NeurIPS 2024).

Images and masks are those of the original data sets, where Detectron2 expects them. datasets/README.md shows the trees.
"""

from __future__ import annotations

from dataclasses import replace

from .pascal_voc import CLASSES as VOC_CLASSES
from .splits import Split, register_split, splits, voc_colors

_README = "datasets/README.md, 'Scribbles for All', says where the files come from and what `python datasets/{}` makes"
_UNPACK = _README.format("prepare_scribbles.py")

_VOC = splits()["voc_2012_scribble_trainaug"]
register_split(
    replace(
        _VOC,
        name="s4pascal_scribble_train",
        scribbles="s4Pascal/scribble/VOCScribble_aug_auto",
        remedies=_VOC.remedies | {"scribbles": _UNPACK},
    ),
    VOC_CLASSES,
    voc_colors(len(VOC_CLASSES)),
)


def _cityscapes(key: str):
    from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

    return [category[key] for category in CITYSCAPES_CATEGORIES]  # in the order of the train ids


def _ade20k():
    from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

    return ADE20K_SEM_SEG_CATEGORIES


for _name, _part, _scribbles in (("scribble_train", "train", "s4Cityscapes/labels/train"), ("val", "val", "")):
    register_split(
        Split(
            name=f"s4cityscapes_{_name}",
            images=f"cityscapes/leftImg8bit/{_part}",
            images_suffix="_leftImg8bit",
            scribbles=_scribbles,
            masks=f"s4Cityscapes/masks/{_part}",
            remedies=dict.fromkeys(("images", "scribbles", "masks"), _README.format("prepare_cityscapes.py")),
        ),
        lambda: _cityscapes("name"),
        lambda: _cityscapes("color"),
    )

for _name, _part, _scribbles in (("scribble_train", "training", "s4ADE20K/labels/training"), ("val", "validation", "")):
    register_split(
        Split(
            name=f"s4ade20k_{_name}",
            images=f"ADEChallengeData2016/images/{_part}",
            scribbles=_scribbles,
            masks=f"ADEChallengeData2016/annotations_detectron2/{_part}",
            remedies=dict.fromkeys(("images", "scribbles", "masks"), _UNPACK),
        ),
        _ade20k,
        voc_colors(150),
    )
