"""A folder data set of a person's own photos: made, read and extended without the slow import of Detectron2."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml

from ..scribbles.vocabulary import Vocabulary, load_vocabulary
from ..utils.errors import BLPSegError
from ..utils.files import IMAGE_EXTENSIONS, image_size, index_folder, read_label, write_bytes_atomic
from ..utils.palette import distinct_colors
from ..utils.yaml_files import merge_mappings, read_config, read_yaml

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
_TEMPLATE = "Folder-Scribble/blpseg_lite.yaml"
_PARTS = ("images/train", "images/val", "masks/val", "scribbles/train")
_HEADER = (
    "# A folder data set; tools/train_net.py --config-file {path} trains on what is scribbled so far.\n"
    "# blpseg/config.py explains every key. tools/annotate.py changes CLASSES, COLORS and NUM_CLASSES, nothing else.\n"
)


def template() -> Path:
    """The recipe that new projects start from: this clone's or the installed package's.

    Raises:
        BLPSegError: it is missing.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / _TEMPLATE).is_file():
            return folder / _TEMPLATE
    raise BLPSegError(f"{package.parent / 'configs' / _TEMPLATE}: no such recipe; install the package again")


def create_project(
    root: str | os.PathLike,
    classes: Sequence[str],
    images: str | os.PathLike | None = None,
    *,
    scribbles: str | os.PathLike | None = None,
    masks: str | os.PathLike | None = None,
    val: int | None = None,
    seed: int = 0,
) -> int:
    """Make a folder data set that ``tools/train_net.py --config-file ROOT/config.yaml`` trains on.

    Args:
        root: its folder; images that already lie in ``root/images/train`` stay.
        classes: names in label order, background first.
        images: a folder of photos to copy; None where they lie in the project.
        scribbles: a folder of PNG scribbles of the same stems to copy.
        masks: a folder of dense masks of the same stems; the photos that have one may become the validation set.
        val: the number of photos, drawn with ``seed``, that are for validation and not for training; by default all
            that have a mask. Without masks they wait in ``images/val`` for the ones to be put in ``masks/val``.
        seed: of that choice.

    Returns:
        the number of photos for training.

    Raises:
        BLPSegError: the project exists, a photo cannot be read, two share a stem, or there is none. Nothing has been
            written then.
    """
    root = Path(root)
    if (root / CONFIG).exists():
        raise BLPSegError(f"{root / CONFIG}: this project exists; choose another folder, or go on in it")
    _check_classes("--classes", classes)
    present = list_images(root / "images/train") if (root / "images/train").is_dir() else {}
    photos = _photos_to_copy(images) if images else {}
    twice = sorted(present.keys() & photos.keys())
    if twice:
        raise BLPSegError(f"{photos[twice[0]]}: {present[twice[0]]} has the same stem; rename one of them")
    if not present and not photos:
        where = images or root / "images/train"
        raise BLPSegError(f"{where}: holds no photo ({', '.join(IMAGE_EXTENSIONS)}); --images names a folder of them")
    for path in photos.values():
        image_size(str(path))
    masked = list_images(masks) if masks else {}
    chosen = _validation(photos, masked, masks, val, seed)
    labels = _scribbles_to_copy(scribbles, photos, chosen) if scribbles else {}
    for part in _PARTS:
        (root / part).mkdir(parents=True, exist_ok=True)
    for stem, path in photos.items():
        _copy(path, root / ("images/val" if stem in chosen else "images/train") / path.name)
        if stem in chosen and stem in masked:
            _copy(masked[stem], root / "masks/val" / masked[stem].name)
        if stem in labels:
            _copy(labels[stem], root / "scribbles/train" / labels[stem].name)
    evaluated = bool(list_images(root / "masks/val"))
    _write_config(root / CONFIG, _new_config(root, list(classes), evaluated))
    return len(present) + len(photos) - len(chosen)


def add_images(root: str | os.PathLike, images: str | os.PathLike, into: str = "images/train") -> int:
    """Copy photos into a project, except those whose stem is there, for training or validation; returns how many.

    Raises:
        BLPSegError: a photo cannot be read, or two share a stem. Nothing has been copied then.
    """
    root = Path(root)
    present = [stem for part in (into, "images/val") if (root / part).is_dir() for stem in list_images(root / part)]
    photos = {stem: path for stem, path in _photos_to_copy(images).items() if stem not in present}
    for path in photos.values():
        image_size(str(path))
    for path in photos.values():
        _copy(path, root / into / path.name)
    return len(photos)


def list_images(folder: str | os.PathLike) -> dict[str, Path]:
    """Stem -> path of the images of a folder, by name; hidden files and others are left out. Raises BLPSegError if
    there is no such folder, or two images share a stem."""
    if not os.path.isdir(folder):
        raise BLPSegError(f"{folder}: no such folder")
    return {stem: Path(path) for stem, path in index_folder(folder).items()}


def _photos_to_copy(folder: str | os.PathLike) -> dict[str, Path]:
    """:func:`list_images`, with a warning of the other files that are not hidden."""
    photos = list_images(folder)
    taken = set(photos.values())
    others = sorted(path.name for path in Path(folder).iterdir() if path.is_file() and path not in taken)
    others = [name for name in others if not name.startswith(".")]
    if others:
        named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        logger.warning(f"{folder}: {len(others)} other files are left out ({named}); photos are "
                       f"{', '.join(IMAGE_EXTENSIONS)}")  # fmt: skip
    return photos


def _scribbles_to_copy(folder, photos: Collection[str], chosen: Collection[str]) -> dict[str, Path]:
    """The scribbles of photos that are for training, with a warning of those of other ones."""
    found = list_images(folder)
    labels = {stem: path for stem, path in found.items() if stem in photos and stem not in chosen}
    if not labels:
        raise BLPSegError(f"{folder}: holds no scribble with the stem of a photo for training")
    for path in labels.values():
        read_label(str(path))
    if len(labels) < len(found):
        stray = sorted(found.keys() - photos.keys())
        why = f"no photo is called {stray[0]}" if stray else "their photos are for validation"
        logger.warning(f"{folder}: {len(labels)} of {len(found)} scribbles are copied; {why}")
    return labels


def folder_classes(folder: Mapping) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Class names and RGB colours by the keys CLASSES or CLASSES_FILE, COLORS and ROOT of ``DATASETS.FOLDER``.

    Raises:
        BLPSegError: the classes are missing, doubled, or given twice, or the colours do not fit.
    """
    classes, colors, file = folder.get("CLASSES"), folder.get("COLORS"), folder.get("CLASSES_FILE")
    if bool(classes) == bool(file):
        raise BLPSegError("DATASETS.FOLDER: give either CLASSES (a list of names) or CLASSES_FILE (a YAML file)")
    source = "DATASETS.FOLDER.CLASSES"
    if file:
        source = os.path.join(os.path.expanduser(folder.get("ROOT", "")), os.path.expanduser(file))
        classes, colors = _read_classes_file(source)
    _check_classes(source, classes)
    if colors and not (
        isinstance(colors, (list, tuple)) and len(colors) == len(classes) and all(map(_is_color, colors))
    ):
        raise BLPSegError(f"{source}: its colours must be one [R, G, B] of 0..255 for each of the classes")
    return list(classes), [tuple(color) for color in colors or distinct_colors(len(classes))]


def set_classes(path: str | os.PathLike, classes: Sequence[str]) -> None:
    """Write more classes into a project's config; those that it has keep their numbers and colours.

    Raises:
        BLPSegError: ``classes`` does not start with the present ones, or the config takes its classes from elsewhere.
    """
    path = Path(path)
    known, colors = folder_classes(_folder(path, read_config(path)))
    if list(classes) == known:
        return
    if list(classes[: len(known)]) != known:
        raise BLPSegError(
            f"{path}: has the classes {' '.join(known)}; name these first, then new ones: strokes keep class numbers"
        )
    _check_classes("--classes", classes)
    content = read_yaml(path)
    folder = _folder(path, content)
    if "CLASSES" not in folder:
        raise BLPSegError(f"{path}: sets no DATASETS.FOLDER.CLASSES itself; add the class where they stand")
    folder["CLASSES"] = list(classes)
    folder["COLORS"] = [list(color) for color in [*colors, *distinct_colors(len(classes))[len(known) :]]]
    merge_mappings({"MODEL": {"SEM_SEG_HEAD": {"NUM_CLASSES": len(classes)}}}, content, str(path))
    _write_config(path, content)


def _new_config(root: Path, classes: list[str], evaluated: bool) -> dict:
    config = read_config(template())
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in root.resolve().name) or "project"
    folder = {
        "NAME": name,
        "ROOT": str(root.resolve()),
        "CLASSES": classes,
        "COLORS": [list(color) for color in distinct_colors(len(classes))],
        "SKIP_UNANNOTATED": True,
    }
    test = f'("{name}_val",)' if evaluated else "()"
    own = {
        "DATASETS": {"FOLDER": folder, "TRAIN": f'("{name}_train",)', "TEST": test},
        "MODEL": {"SEM_SEG_HEAD": {"NUM_CLASSES": len(classes)}},
        "OUTPUT_DIR": str(root.resolve() / "models"),
    }
    merge_mappings(own, config, _TEMPLATE)
    return config


def _validation(photos, masked, masks, val, seed) -> set[str]:
    candidates = sorted(photos.keys() & masked.keys()) if masks else sorted(photos)
    if masks and not candidates:
        raise BLPSegError(f"{masks}: holds no mask with the stem of a photo")
    count = val if val is not None else len(candidates) if masks else 0
    if count > len(candidates):
        raise BLPSegError(f"--val {count}: only {len(candidates)} photos can be chosen")
    if count and count >= len(photos):
        raise BLPSegError(f"all {len(photos)} photos would be for validation; --val N says how many shall be")
    return set(random.Random(seed).sample(candidates, count))


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        raise BLPSegError(f"{target}: is there already; nothing is overwritten")
    shutil.copyfile(source, target)


def _folder(path, config: Mapping) -> dict:
    folder = (config.get("DATASETS") or {}).get("FOLDER")
    if not isinstance(folder, dict):
        raise BLPSegError(f"{path}: has no DATASETS.FOLDER; tools/new_project.py makes a config that has it")
    return folder


def _read_classes_file(path: str) -> tuple[list, list | None]:
    """Names and colours: `classes: [...]` with `colors: [[r, g, b], ...]`, or a vocabulary file of the converters."""
    if not os.path.isfile(path):
        raise BLPSegError(f"{path}: no such file (DATASETS.FOLDER.CLASSES_FILE, relative to DATASETS.FOLDER.ROOT)")
    content = read_yaml(path)
    if isinstance(content, dict) and isinstance(content.get("classes"), list):
        return content["classes"], content.get("colors")
    return _from_vocabulary(load_vocabulary(path))


def _from_vocabulary(vocabulary: Vocabulary) -> tuple[list[str], list | None]:
    names: dict[int, str] = {}
    for name, number in vocabulary.ids.items():
        names.setdefault(number, name)  # the first of several names for a class
    if sorted(names) != list(range(len(names))):
        raise BLPSegError(f"{vocabulary.source}: classes need the numbers 0, 1, ..., found {sorted(names)}")
    colors = {number: color for color, number in reversed(vocabulary.colors.items())}
    ordered = [colors.get(number) for number in range(len(names))]
    return [names[number] for number in range(len(names))], ordered if all(ordered) else None


def _check_classes(where: str, classes) -> None:
    if not all(isinstance(c, str) and c.strip() for c in classes) or len(set(classes)) != len(classes):
        raise BLPSegError(f"{where}: class names must be different strings, found {list(classes)}")
    if where == "--classes" and any("," in c for c in classes):
        raise BLPSegError(f"--classes: put spaces between the names, and no commas; found {list(classes)}")
    if not 2 <= len(classes) <= 254:
        raise BLPSegError(f"{where}: 2 to 254 classes, background first, are possible; found {list(classes)}")
    if any(len(c) > 100 or not c.isprintable() for c in classes):
        raise BLPSegError(f"{where}: a class name is at most 100 printable characters")


def _is_color(color: object) -> bool:
    return (
        isinstance(color, (list, tuple))
        and len(color) == 3
        and all(isinstance(v, int) and 0 <= v <= 255 for v in color)
    )


def _write_config(path: Path, config: Mapping) -> None:
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_bytes_atomic(str(path), (_HEADER.format(path=path) + text).encode(), durable=True)
