"""ACDC, short-axis slices of cardiac MRI with scribbles drawn by experts; evaluated per volume in 3-D."""

from __future__ import annotations

import os
import re

import numpy as np

from ...utils.errors import BLPSegError, describe
from ...utils.files import write_png_atomic
from ...utils.parallel import is_up_to_date, process_files
from .splits import Split, register_split, require_folder

__all__ = ["CLASSES", "COLORS", "FOLDS", "VOLUME_PATTERN", "prepare"]

CLASSES = ["background", "right ventricle", "myocardium", "left ventricle"]
COLORS = [(0, 0, 0), (66, 133, 244), (52, 168, 83), (234, 67, 53)]
VOLUME_PATTERN = r"(?P<volume>patient\d+_frame\d+)_slice_(?P<slice>\d+)"

FOLDS = 5  # WSL4MIS: fold k holds patients 20 (k - 1) + 1 .. 20 k back
_PATIENTS_A_FOLD = 20
_UNANNOTATED_H5 = 4  # in the .h5 files

_REMEDIES = dict.fromkeys(
    ("images", "scribbles", "masks"),
    "run `python datasets/prepare_acdc.py`, which converts the .h5 files (datasets/README.md, 'ACDC'), or set "
    "DETECTRON2_DATASETS to where acdc_png lies",
)

for _split in (
    Split(
        name="acdc_scribble_train",
        images="acdc_png/images/train",
        scribbles="acdc_png/scribbles/train",
        masks="acdc_png/masks/train",
        remedies=_REMEDIES,
        volume=VOLUME_PATTERN,
    ),
    Split(
        name="acdc_val",
        images="acdc_png/images/val",
        masks="acdc_png/masks/val",
        remedies=_REMEDIES,
        volume=VOLUME_PATTERN,
    ),
):
    register_split(_split, CLASSES, COLORS, evaluator_type="sem_seg_volume")


def prepare(source: str, output: str, fold: int = 1, jobs: int = 1) -> int:
    """Convert the .h5 files of WSL4MIS to ``{images,scribbles,masks}/{train,val}/PATIENT_FRAME_slice_N.png``.

    Images become round(255 x), "not annotated" 255. Patients of the fold are the validation split, without
    scribbles. A frame that lies there as slices and as a volume is read from its slices. Files that are newer than
    their source are left alone.

    Args:
        source: folder with ``ACDC_training_slices`` and / or ``ACDC_training_volumes``.
        output: folder to write, by convention ``acdc_png``.
        fold: 1..5.
        jobs: processes.

    Returns:
        Exit status: 1 if a file is bad; each is named on stderr.

    Raises:
        BLPSegError: h5py or the folders are missing.
    """
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise BLPSegError("reading .h5 files needs h5py: pip install 'blpseg[medical]'") from error
    if not 1 <= fold <= FOLDS:
        raise BLPSegError(f"fold {fold}: WSL4MIS has the folds 1..{FOLDS}")
    require_folder(source, "datasets/README.md, 'ACDC', tells where it comes from")
    slices = _h5_files(source, "ACDC_training_slices")
    sliced = {stem.split("_slice_")[0] for stem in slices}
    volumes = {stem: path for stem, path in _h5_files(source, "ACDC_training_volumes").items() if stem not in sliced}
    tasks = [(path, stem, output, fold) for stem, path in sorted((slices | volumes).items())]
    if not tasks:
        raise BLPSegError(
            f"{source}: no .h5 file in ACDC_training_slices or ACDC_training_volumes; see datasets/README.md, 'ACDC'"
        )
    return process_files(_convert, tasks, jobs, "ACDC").finish(f"{output}: PNG files of")


def _h5_files(source: str, folder: str) -> dict[str, str]:
    folder = os.path.join(source, folder)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return {name[:-3]: os.path.join(folder, name) for name in names if name.endswith(".h5") and name[0] != "."}


def _convert(task: tuple[str, str, str, int]) -> bool:
    """One .h5 file to PNG files. True where something was written."""
    path, stem, output, fold = task
    match = re.fullmatch(r"patient(?P<patient>\d+)_frame\d+(_slice_(?P<slice>\d+))?", stem)
    if match is None:
        raise BLPSegError(f"{path}: the name is not patientNNN_frameNN[_slice_N].h5")
    held_back = (int(match["patient"]) - 1) // _PATIENTS_A_FOLD + 1 == fold
    split = "val" if held_back else "train"
    parts = ("images", "masks") if held_back else ("images", "masks", "scribbles")
    first = int(match["slice"] or 0)
    volume_id = stem.split("_slice_")[0]

    import h5py

    try:
        with h5py.File(path, "r") as file:
            count = 1 if match["slice"] else len(file["image"])
            targets = [
                {part: os.path.join(output, part, split, f"{volume_id}_slice_{first + i}.png") for part in parts}
                for i in range(count)
            ]
            if all(is_up_to_date(target, path) for names in targets for target in names.values()):
                return False
            wanted = ["image", "label"] + ([] if held_back else ["scribble"])
            arrays = {key: np.asarray(file[key]) for key in wanted}
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BLPSegError(f"{path}: not an .h5 file of WSL4MIS's layout ({describe(error)})") from error

    if match["slice"]:
        arrays = {key: array[None] for key, array in arrays.items()}
    image, mask = arrays["image"], arrays["label"]
    shapes = {key: array.shape for key, array in arrays.items()}
    if image.ndim != 3 or len(set(shapes.values())) != 1:
        raise BLPSegError(f"{path}: arrays must have one shape, (H, W) for a slice or (N, H, W); found {shapes}")
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise BLPSegError(f"{path}: image values must lie in 0..1")
    labels = {"masks": _labels(path, "label", mask, len(CLASSES) - 1)}
    if not held_back:
        scribble = _labels(path, "scribble", arrays["scribble"], _UNANNOTATED_H5)
        labels["scribbles"] = np.where(scribble == _UNANNOTATED_H5, np.uint8(255), scribble)
    labels["images"] = np.round(image * 255).astype(np.uint8)
    for i, names in enumerate(targets):
        for part, target in names.items():
            write_png_atomic(target, labels[part][i])
    return True


def _labels(path: str, key: str, array: np.ndarray, largest: int) -> np.ndarray:
    if array.size and (array.min() < 0 or array.max() > largest or (array != np.floor(array)).any()):
        raise BLPSegError(f"{path}: {key} must hold whole numbers 0..{largest}, found {array.min()}..{array.max()}")
    return array.astype(np.uint8)
