"""The generated data set: shapes on textured grounds, made by ``datasets/make_synthetic.py``."""

from .splits import Split, register_split, voc_colors

CLASSES = ["background", "disc", "star", "cross", "ring", "comb", "leaf"]
FOLDER = "synthetic"

_REMEDIES = dict.fromkeys(
    ("images", "scribbles", "masks"),
    "run `python datasets/make_synthetic.py`, or set DETECTRON2_DATASETS to where the synthetic folder lies",
)

_TRAIN = (f"{FOLDER}/{part}/train" for part in ("images", "scribbles", "masks"))

for _split in (
    Split("synthetic_scribble_train", *_TRAIN, remedies=_REMEDIES),
    Split("synthetic_val", f"{FOLDER}/images/val", masks=f"{FOLDER}/masks/val", remedies=_REMEDIES),
):
    register_split(_split, CLASSES, voc_colors(len(CLASSES)))
