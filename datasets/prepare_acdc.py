#!/usr/bin/env python
"""Convert ACDC with expert scribbles (the .h5 files of WSL4MIS) to PNG, splits acdc_scribble_train and acdc_val."""

import argparse
import os
import re

import numpy as np

from blpseg.data.datasets.acdc import CLASSES
from blpseg.data.datasets.splits import require_folder
from blpseg.utils.cli import add_work_flags, run_command
from blpseg.utils.errors import BLPSegError, describe
from blpseg.utils.files import read_bytes
from blpseg.utils.labels import UNANNOTATED
from blpseg.utils.made import is_up_to_date, stamp, write_label
from blpseg.utils.parallel import process_files
from blpseg.utils.paths import data_root

FOLDS = 5  # WSL4MIS: fold k holds patients 20 (k - 1) + 1 .. 20 k back
_PATIENTS_A_FOLD = 20
_UNANNOTATED_H5 = 4  # in the .h5 files
_LARGEST_ARRAY = 1 << 28  # bytes; a volume of ACDC has some four million

EXAMPLE = """
examples:
  python datasets/prepare_acdc.py
  python datasets/prepare_acdc.py --input /data/ACDC --output /data/acdc_png --fold 2
"""


def prepare(source: str, output: str, fold: int = 1, workers: int | None = None, force: bool = False) -> int:
    """Convert the .h5 files of WSL4MIS to ``{images,scribbles,masks}/{train,val}/PATIENT_FRAME_slice_N.png``.

    Images become round(255 x), "not annotated" 255. Patients of the fold are the validation split, without
    scribbles. A frame that lies there as slices and as a volume is read from its slices. Files that are up to date are
    left alone, and so are those that were not made here.

    Args:
        source: folder with ``ACDC_training_slices`` and / or ``ACDC_training_volumes``.
        output: folder to write, by convention ``acdc_png``.
        fold: 1..5.
        workers: processes.
        force: make files again that are up to date, and replace those that were not made here.

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
    require_folder(source, "datasets/README.md, 'ACDC', says where it comes from")
    slices = _h5_files(source, "ACDC_training_slices")
    sliced = {stem.split("_slice_")[0] for stem in slices}
    volumes = {stem: path for stem, path in _h5_files(source, "ACDC_training_volumes").items() if stem not in sliced}
    tasks = [(path, stem, output, fold, force) for stem, path in sorted((slices | volumes).items())]
    if not tasks:
        raise BLPSegError(
            f"{source}: no .h5 file in ACDC_training_slices or ACDC_training_volumes; see datasets/README.md, 'ACDC'"
        )
    return process_files(_convert, tasks, workers, "ACDC").finish("slices and volumes", output)


def _h5_files(source: str, folder: str) -> dict[str, str]:
    folder = os.path.join(source, folder)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return {name[:-3]: os.path.join(folder, name) for name in names if name.endswith(".h5") and name[0] != "."}


def _convert(task: tuple[str, str, str, int, bool]) -> bool:
    """One .h5 file to PNG files. True where something was written."""
    path, stem, output, fold, force = task
    match = re.fullmatch(r"patient(?P<patient>\d+)_frame\d+(_slice_(?P<slice>\d+))?", stem)
    if match is None:
        raise BLPSegError(f"{path}: the name is not patientNNN_frameNN[_slice_N].h5")
    held_back = (int(match["patient"]) - 1) // _PATIENTS_A_FOLD + 1 == fold
    split = "val" if held_back else "train"
    parts = ("images", "masks") if held_back else ("images", "masks", "scribbles")
    first = int(match["slice"] or 0)
    volume_id = stem.split("_slice_")[0]

    import h5py

    made_from = stamp(read_bytes(path))
    try:
        with h5py.File(path, "r") as file:
            wanted = ["image", "label"] + ([] if held_back else ["scribble"])
            sets = {key: _data_set(path, file, key) for key in wanted}
            count = 1 if match["slice"] else len(sets["image"])
            targets = [
                {part: os.path.join(output, part, split, f"{volume_id}_slice_{first + i}.png") for part in parts}
                for i in range(count)
            ]
            if not force and all(is_up_to_date(target, made_from) for names in targets for target in names.values()):
                return False
            arrays = {key: np.asarray(found) for key, found in sets.items()}
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BLPSegError(f"{path}: not an .h5 file of WSL4MIS's layout ({describe(error)})") from error

    if match["slice"]:
        arrays = {key: array[None] for key, array in arrays.items()}
    labels = _pixels(path, arrays)
    for i, names in enumerate(targets):
        for part, target in names.items():
            write_label(target, labels[part][i], made_from, force=force)
    return True


def _data_set(path: str, file, key: str):
    """A data set of an .h5 file, whose numbers lie in the file itself and are not too many to read."""
    import h5py

    link = file.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink) or not isinstance(file[key], h5py.Dataset):
        raise BLPSegError(f"{path}: {key} is missing, or a link instead of data")
    found = file[key]
    if found.is_virtual or found.external or found.dtype.kind not in "iuf" or found.nbytes > _LARGEST_ARRAY:
        raise BLPSegError(f"{path}: {key} must be numbers in the file itself, {_LARGEST_ARRAY} bytes at most")
    return found


def _pixels(path: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the arrays of a file become: folder -> (N, H, W) uint8."""
    image = arrays["image"]
    shapes = {key: array.shape for key, array in arrays.items()}
    if image.ndim != 3 or len(set(shapes.values())) != 1:
        raise BLPSegError(f"{path}: arrays must have one shape, (H, W) for a slice or (N, H, W); found {shapes}")
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise BLPSegError(f"{path}: image values must lie in 0..1")
    pixels = {
        "images": np.round(image * 255).astype(np.uint8),
        "masks": _labels(path, "label", arrays["label"], len(CLASSES) - 1),
    }
    if "scribble" in arrays:
        scribble = _labels(path, "scribble", arrays["scribble"], _UNANNOTATED_H5)
        pixels["scribbles"] = np.where(scribble == _UNANNOTATED_H5, np.uint8(UNANNOTATED), scribble)
    return pixels


def _labels(path: str, key: str, array: np.ndarray, largest: int) -> np.ndarray:
    if array.size and (array.min() < 0 or array.max() > largest or (array != np.floor(array)).any()):
        raise BLPSegError(f"{path}: {key} must hold whole numbers 0..{largest}, found {array.min()}..{array.max()}")
    return array.astype(np.uint8)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source, output = os.path.join(data_root(), "ACDC"), os.path.join(data_root(), "acdc_png")
    parser.add_argument(
        "--input", default=source, help=f"holds ACDC_training_slices and / or ACDC_training_volumes (default: {source})"
    )
    parser.add_argument("--output", default=output, help=f"folder to write (default: {output})")
    parser.add_argument(
        "--fold",
        type=int,
        default=1,
        choices=range(1, FOLDS + 1),
        help="validation patients: 20 (fold - 1) + 1 .. 20 fold (default: 1)",
    )
    add_work_flags(parser, force="make files again that are up to date, and replace files that were not made here")
    arguments = parser.parse_args()
    return prepare(arguments.input, arguments.output, arguments.fold, arguments.workers, arguments.force)


if __name__ == "__main__":
    run_command(main)
