"""The generated data set: shapes on textured grounds, made by ``datasets/make_synthetic.py``."""

from .splits import Split, register_split, voc_colors

__all__ = ["CLASSES", "FOLDER"]

CLASSES = ["background", "disc", "star", "cross", "ring", "comb", "leaf"]
FOLDER = "synthetic"

_REMEDIES = dict.fromkeys(
    ("images", "scribbles", "masks"),
    "run `python datasets/make_synthetic.py`, or set DETECTRON2_DATASETS to where the synthetic folder lies",
)

for _split in (
    Split(
        name="synthetic_scribble_train",
        images=f"{FOLDER}/images/train",
        scribbles=f"{FOLDER}/scribbles/train",
        masks=f"{FOLDER}/masks/train",
        remedies=_REMEDIES,
    ),
    Split(name="synthetic_val", images=f"{FOLDER}/images/val", masks=f"{FOLDER}/masks/val", remedies=_REMEDIES),
):
    register_split(_split, CLASSES, voc_colors(len(CLASSES)))
