"""Shared by all data sets: a split on disk, its records, its entry in Detectron2's catalogs.

Nothing here looks at the disk before :func:`load_records` (or ``DatasetCatalog.get``) is called, and nothing imports
Detectron2: a split enters the catalogs as soon as something else has imported them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

from ...scribbles.vocabulary import voc_color
from ...utils.errors import BLPSegError
from ...utils.files import image_size, index_folder
from ...utils.imports import when_imported
from ...utils.labels import UNANNOTATED
from ...utils.paths import data_root, open_file

_HEADER_THREADS = 16  # reading headers waits for the disk, not for the processor


def voc_colors(count: int) -> list[tuple[int, int, int]]:
    """PASCAL VOC's colours, (R, G, B) each, of the classes 0 to ``count - 1``."""
    return [voc_color(number) for number in range(count)]


@dataclass(frozen=True)
class Split:
    """One split: folders below ``root`` whose files belong together by stem (``a.jpg``, ``a.png``).

    Attributes:
        name: in the catalogs.
        images, scribbles, masks: folders. Without ``scribbles`` it is a split to evaluate on, and masks must be there.
        names: text file with one stem a line; "" takes every image of the folder.
        images_suffix: where given, the images are STEM + suffix, in the folder of images or one folder below it.
        root: "" for :func:`data_root`.
        remedies: part ("images", "scribbles", "masks", "names") -> what to do when it is missing.
        volume: regular expression over the stem with the groups ``volume`` and ``slice``, for slices of volumes, and
            ``subject`` where several volumes are of one.
        skip_unannotated: leave out images without a scribble file, rather than ask for it.
        evaluated: a split to evaluate on, by its masks, or by its scribbles where the folder of masks is missing.
    """

    name: str
    images: str
    scribbles: str = ""
    masks: str = ""
    names: str = ""
    images_suffix: str = ""
    root: str = ""
    remedies: Mapping[str, str] = field(default_factory=dict)
    volume: str = ""
    skip_unannotated: bool = False
    evaluated: bool = False

    def path(self, part: str) -> str:
        """Where a part ("images", "scribbles", "masks", "names") lies; "" if the split has none."""
        relative = getattr(self, part)
        return os.path.join(self.root or data_root(), relative) if relative else ""

    @property
    def needed(self) -> str:
        """The part that each image needs beside itself: "scribbles" or "masks"."""
        if not self.scribbles:
            return "masks"
        masks = self.evaluated and (os.path.isdir(self.path("masks")) or not os.path.isdir(self.path("scribbles")))
        return "masks" if masks else "scribbles"

    def remedy(self, part: str) -> str:
        """What to do when a part is missing."""
        return self.remedies.get(part, "docs/DATA.md shows the layout")


_SPLITS: dict[str, Split] = {}


def splits() -> Mapping[str, Split]:
    """Every split that BLPSeg registered, by name."""
    return _SPLITS


def register_split(
    split: Split,
    classes: Sequence[str] | Callable[[], Sequence[str]],
    colors: Sequence[Sequence[int]] | Callable[[], Sequence[Sequence[int]]],
    ignore_label: int = UNANNOTATED,
    evaluator_type: str = "sem_seg",
) -> None:
    """Enter a split into DatasetCatalog, MetadataCatalog and :func:`splits`, replacing one of the same name.

    Args:
        split: see :class:`Split`.
        classes: C names, background first, or a function that returns them once Detectron2 is imported.
        colors: C RGB triples, or such a function.
        ignore_label: value of the dense masks that stands for "no class".
        evaluator_type: "sem_seg" or "sem_seg_volume".
    """

    def enter():
        from detectron2.data import DatasetCatalog, MetadataCatalog

        # Detectron2 has a voc_2012_val of its own, for detection.
        DatasetCatalog.pop(split.name, None)
        MetadataCatalog.pop(split.name, None)
        DatasetCatalog.register(split.name, lambda: load_records(split.name))
        MetadataCatalog.get(split.name).set(
            stuff_classes=list(classes() if callable(classes) else classes),
            stuff_colors=[tuple(int(v) for v in color) for color in (colors() if callable(colors) else colors)],
            ignore_label=ignore_label,
            evaluator_type=evaluator_type,
        )

    _SPLITS[split.name] = split
    when_imported("detectron2.data", enter)


def load_records(name: str, optional: Collection[str] = (), sizes: bool = True) -> list[dict]:
    """The records of a split: ``file_name``, ``scribble_file_name``, ``sem_seg_file_name``, ``height``, ``width``,
    ``image_id`` (the stem), and for slices ``volume_id`` (str), ``slice_index`` (int) and perhaps ``subject`` (str).

    Args:
        name: in the catalogs. DatasetCatalog is asked for one that BLPSeg did not register.
        optional: parts ("images", "scribbles", "masks") that may be missing; dense supervision needs no scribbles. In
            a training split the masks always may. A missing image is named without its extension.
        sizes: whether to read height and width from the images.

    Raises:
        BLPSegError: the name is not registered, or a folder, a list or a file is missing; the message says how to
            mend it.
    """
    split = _SPLITS.get(name)
    if split is None:
        from detectron2.data import DatasetCatalog

        if name not in DatasetCatalog:
            known = ", ".join(sorted(_SPLITS))
            raise BLPSegError(f"data set {name!r} is not registered; there are {known} (DATASETS.FOLDER adds your own)")
        return DatasetCatalog.get(name)

    images = _index(split, "images")
    names = split.path("names")
    stems = read_names(names, split.remedy("names")) if names else sorted(images)
    if "images" not in optional:
        _require(split, "images", images, stems)
    folder = split.path("images")
    records = [{"file_name": images.get(stem, os.path.join(folder, stem)), "image_id": stem} for stem in stems]

    for part, key in (("scribbles", "scribble_file_name"), ("masks", "sem_seg_file_name")):
        if not getattr(split, part):
            continue
        if part in optional or part != split.needed:
            files = index_folder(split.path(part)) if os.path.isdir(split.path(part)) else {}
        else:
            files = _index(split, part)
            if part == "scribbles" and split.skip_unannotated:
                records = [record for record in records if record["image_id"] in files]
            _require(split, part, files, [record["image_id"] for record in records] or stems)
        for record in records:
            if record["image_id"] in files:
                record[key] = files[record["image_id"]]

    if sizes:
        with ThreadPool(_HEADER_THREADS) as pool:
            for record, size in zip(records, pool.map(image_size, [r["file_name"] for r in records]), strict=True):
                record["height"], record["width"] = size
    if split.volume:
        for record in records:
            match = re.fullmatch(split.volume, record["image_id"])
            if match is None:
                raise BLPSegError(f"{record['file_name']}: the name does not give volume and slice as {split.volume!r}")
            record["volume_id"], record["slice_index"] = match["volume"], int(match["slice"])
            if "subject" in match.groupdict():
                record["subject"] = match["subject"]
    return records


def require_folder(folder: str, remedy: str) -> None:
    """Raise BLPSegError with the remedy unless the folder exists."""
    if not os.path.isdir(folder):
        raise BLPSegError(f"{folder}: no such folder; {remedy}")


def read_names(path: str, remedy: str) -> list[str]:
    """The names in a list file, one a line. Raises BLPSegError with the remedy if it is missing, empty, or not text."""
    if not os.path.isfile(path):
        raise BLPSegError(f"{path}: no such list; {remedy}")
    with open_file(path, "rb") as file:
        data = file.read()
    try:
        names = data.decode("utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise BLPSegError(f"{path}: not a text file; {remedy}") from error
    if not names:
        raise BLPSegError(f"{path}: the list is empty; {remedy}")
    return names


def _index(split: Split, part: str) -> dict[str, str]:
    folder, remedy = split.path(part), split.remedy(part)
    require_folder(folder, remedy)
    files = index_folder(folder, split.images_suffix if part == "images" else "")
    if not files:
        raise BLPSegError(f"{folder}: holds no image; {remedy}")
    return files


def _require(split: Split, part: str, files: Mapping[str, str], stems: Sequence[str]) -> None:
    lacking = [stem for stem in stems if stem not in files]
    if lacking:
        count = f"{len(lacking)} of {len(stems)} images, first {lacking[0]!r}"
        raise BLPSegError(f"{split.path(part)}: no file for {count}; {split.remedy(part)}")
