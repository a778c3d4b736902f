"""The strokes of a project, safe on the disk.

Strokes are the truth; label images are drawn from them. Everything that comes in is checked, and a change counts as
saved only when strokes and label are on the disk.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data.project import CONFIG, add_images, create_project, folder_classes, list_images, set_classes
from ..scribbles._untrusted import parse_json, pixel_points
from ..scribbles.rasterize import UNANNOTATED, rasterize_strokes
from ..utils.errors import BLPSegError, describe
from ..utils.files import image_size, lock_file, read_label, read_label_of, write_bytes_atomic
from ..utils.made import is_up_to_date, stamp, write_label
from ..utils.yaml_files import read_config
from .regions import region_strokes

# Far beyond what a person draws on a photo, and little enough to be handled at once.
MAX_BODY = 8 << 20  # bytes of a request
MAX_STROKES = 10_000
MAX_POINTS = 300_000  # of all strokes of a photo
MAX_WIDTH = 100  # pixels; the time that a brush takes grows with its square
_MAX_LENGTH = 20_000_000  # pixels that all strokes of a photo set, before brushes


class Unknown(BLPSegError):
    """No such photo."""


class Conflict(BLPSegError):
    """Somebody else changed the strokes in the meantime."""


@dataclass
class Photo:
    """A photo of the project, its size upright in pixels, and what is known of its strokes."""

    name: str
    path: Path
    height: int
    width: int
    count: int = 0  # strokes
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def stem(self) -> str:
        return self.path.stem


class Project:
    """A folder data set that is being annotated; one process at a time holds it.

    Attributes:
        root: its folder.
        classes, colors: names and (R, G, B), in label order.
        photos: name -> :class:`Photo`, in the order of their names.
    """

    def __init__(
        self, root: str | os.PathLike, images: str | os.PathLike | None = None, classes: Sequence[str] | None = None
    ):
        """
        Args:
            root: the project's folder; it becomes one on the first start.
            images: photos to copy into it; those that it has are left as they are.
            classes: names, background first; asked for on the first start. Later, more names may follow the known ones.

        Raises:
            BLPSegError: what :func:`create_project` raises; or another process serves this project.
        """
        self.root = Path(root).expanduser().resolve()
        self.config_path = self.root / CONFIG
        if not self.config_path.exists():
            if not classes:
                raise BLPSegError(
                    f"{self.root}: no project yet; --classes names its classes, background first, and --images the "
                    "folder of its photos"
                )
            create_project(self.root, list(classes), images)
        else:
            if classes:
                set_classes(self.config_path, list(classes))
            if images:
                add_images(self.root, images)
        self._lock, self._class_lock = lock_file(str(self.root / ".lock")), threading.Lock()
        if self._lock is None:
            raise BLPSegError(f"{self.root}: another annotator serves this project; end it, or use its page")
        self._drawn: tuple[str, list[dict], np.ndarray] = "", [], np.empty(0, np.uint8)  # the photo under the pen
        self._read()
        self._load_photos()

    def _read(self) -> None:
        config = read_config(self.config_path)
        folder = {"TRAIN_IMAGES": "images/train", "TRAIN_SCRIBBLES": "scribbles/train", "CLASSES": [],
                  **(config.get("DATASETS") or {}).get("FOLDER", {}), "ROOT": str(self.root)}  # fmt: skip
        self.classes, self.colors = folder_classes(folder)
        self._images = self.root / folder["TRAIN_IMAGES"]
        self._scribbles = self.root / folder["TRAIN_SCRIBBLES"]

    def close(self) -> None:
        """Let another process have the project."""
        self._lock.close()

    def _load_photos(self) -> None:
        self.photos: dict[str, Photo] = {}
        for path in list_images(self._images).values():
            try:
                height, width = image_size(str(path))
                photo = Photo(path.name, path, height, width)
                document = self.read(photo)
            except BLPSegError as error:
                print(f"left out: {describe(error)}", file=sys.stderr)
                continue
            photo.count = len(document["strokes"])
            self.photos[photo.name] = photo
            # A process that was killed between strokes and label leaves an older label.
            if _modified(self.label_path(photo)) < _modified(self.strokes_path(photo)):
                self._keep_foreign_label(photo, document)
                self._write_label(photo, document)
        if not self.photos:
            raise BLPSegError(f"{self._images}: holds no readable photo; put some there, or give --images")

    def add_class(self, name: str) -> None:
        """A class more, after the others.

        Raises:
            BLPSegError: the name is empty, taken, or not printable.
        """
        with self._class_lock:
            set_classes(self.config_path, [*self.classes, name])
            self._read()

    def photo(self, name: str) -> Photo:
        """The listed photo of this name, whatever else the name may mean to a file system.

        Raises:
            Unknown: there is none.
        """
        try:
            return self.photos[name]
        except KeyError:
            raise Unknown(f"no photo {name[:100]!r} in this project") from None

    def strokes_path(self, photo: Photo) -> Path:
        return self.root / "strokes" / f"{photo.stem}.json"

    def label_path(self, photo: Photo) -> Path:
        return self._scribbles / f"{photo.stem}.png"

    def read(self, photo: Photo) -> dict:
        """The stroke document as it is on the disk; strokes of an imported label image where there is none yet.

        Raises:
            BLPSegError: the file is damaged; it is left alone.
        """
        path = self.strokes_path(photo)
        try:
            document = parse_json(str(path), path.read_bytes())
        except FileNotFoundError:
            return self._imported(photo)
        version = document.get("version") if isinstance(document, dict) else None
        if not isinstance(version, int) or version < 1:
            raise BLPSegError(f"{path}: not a stroke file of this project; move it away")
        return self._check(photo, document, str(path)) | {"version": version}

    def write(self, photo: Photo, document: object) -> dict:
        """Check a stroke document, and save it and its label; they are on the disk when this returns.

        Args:
            photo: which.
            document: ``{"strokes": [{"class", "width", "points", "time"}]}``, see docs/ANNOTATE.md. ``version`` is that
                of the document it goes back to; without it, it replaces whatever there is.

        Returns:
            the saved document, with its new ``version``.

        Raises:
            Conflict: the strokes on the disk are of another version.
            BLPSegError: the document is not as it should be; nothing has changed then.
        """
        checked = self._check(photo, document, photo.name)
        version = document.get("version")
        if version is not None and (type(version) is not int or not 0 <= version < 1 << 53):
            raise BLPSegError(f"{photo.name}: version {str(version)[:40]!r} is no version number")
        with photo.lock:
            stored = self.read(photo)
            if version is not None and version != stored["version"]:
                raise Conflict(
                    f"{photo.name} was changed elsewhere (version {stored['version']}, yours goes back to {version}); "
                    "load its strokes and draw again"
                )
            self._keep_foreign_label(photo, stored)
            checked["version"] = stored["version"] + 1
            data = json.dumps(checked, ensure_ascii=False, separators=(",", ":")).encode()
            write_bytes_atomic(str(self.strokes_path(photo)), data, durable=True)
            self._write_label(photo, checked)
            photo.count = len(checked["strokes"])
        return checked

    def rasterize(self, photo: Photo, document: dict) -> np.ndarray:
        """The label of checked strokes: (H, W) uint8, 255 = not annotated."""
        strokes = document["strokes"]
        name, known, label = self._drawn
        # Later strokes cover earlier ones, so that new ones go over what the others gave.
        if name != photo.name or known != strokes[: len(known)]:
            known, label = [], np.full((photo.height, photo.width), UNANNOTATED, np.uint8)
        fresh = [(s["class"], _pixels(photo.name, photo, s), s["width"]) for s in strokes[len(known) :]]
        drawn = rasterize_strokes(fresh, photo.height, photo.width)
        label = np.where(drawn == UNANNOTATED, label, drawn)
        self._drawn = photo.name, strokes, label
        return label.copy()

    def _imported(self, photo: Photo) -> dict:
        strokes = []
        if self.label_path(photo).exists():
            path = str(self.label_path(photo))
            label = read_label_of(str(photo.path), path, (photo.height, photo.width))
            if ((label >= len(self.classes)) & (label != UNANNOTATED)).any():
                raise BLPSegError(f"{path}: has values beyond the {len(self.classes)} classes and 255; correct it")
            for number in np.setdiff1d(np.unique(label), UNANNOTATED):
                strokes += region_strokes(label == number, int(number))
        return {"image": photo.name, "width": photo.width, "height": photo.height, "version": 0, "strokes": strokes}

    def _write_label(self, photo: Photo, document: dict) -> None:
        label = self.rasterize(photo, document)
        write_label(str(self.label_path(photo)), label, _stamp(label), force=True, durable=True)

    def _keep_foreign_label(self, photo: Photo, stored: dict) -> None:
        """Nothing that somebody else drew is overwritten: a label that is not ours moves to scribbles/replaced."""
        path = self.label_path(photo)
        try:
            label = read_label(str(path))
        except BLPSegError:
            label = None  # missing or damaged: it can be drawn anew
        # One that carries the digest of its own pixels is ours, though a kill left it older than the strokes.
        ours = label is not None and is_up_to_date(str(path), _stamp(label))
        if path.exists() and not ours and not np.array_equal(label, self.rasterize(photo, stored)):
            kept = self.root / "scribbles/replaced" / f"{photo.stem}-{time.time_ns()}.png"
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, kept)
            print(f"{path}: not drawn from strokes; kept as {kept}", file=sys.stderr)

    def _check(self, photo: Photo, document: object, where: str) -> dict:
        """A document of known keys, plain types and bounded size."""
        if not isinstance(document, dict) or not isinstance(document.get("strokes"), list):
            raise BLPSegError(f'{where}: an object with a list of "strokes" is expected')
        for key, value in (("image", photo.name), ("width", photo.width), ("height", photo.height)):
            if document.get(key, value) != value:
                raise BLPSegError(f"{where}: {key} is {str(document[key])[:100]!r}, the photo's is {value!r}")
        strokes = document["strokes"]
        if len(strokes) > MAX_STROKES:
            raise BLPSegError(f"{where}: {len(strokes)} strokes are more than {MAX_STROKES}")
        checked = [self._check_stroke(stroke, f"{where}: stroke {i}") for i, stroke in enumerate(strokes, 1)]
        count = sum(len(stroke["points"]) for stroke in checked)
        if count > MAX_POINTS:
            raise BLPSegError(f"{where}: {count} points are more than {MAX_POINTS}")
        for number, stroke in enumerate(checked, 1):
            points = _pixels(f"{where}: stroke {number}", photo, stroke)
            count += int(np.abs(np.diff(points, axis=0)).max(axis=1, initial=0).sum())
        if count > _MAX_LENGTH:
            raise BLPSegError(f"{where}: strokes of {count} pixels in all are longer than {_MAX_LENGTH}")
        return {"image": photo.name, "width": photo.width, "height": photo.height, "version": 0, "strokes": checked}

    def _check_stroke(self, stroke: object, where: str) -> dict:
        if not isinstance(stroke, dict):
            raise BLPSegError(f"{where}: is no object")
        number, points, width = stroke.get("class"), stroke.get("points"), stroke.get("width", 1)
        if isinstance(number, str) and number in self.classes:
            number = self.classes.index(number)
        if type(number) is not int or not 0 <= number < len(self.classes):
            raise BLPSegError(f"{where}: class {str(number)[:100]!r} is none of the {len(self.classes)}")
        if type(width) not in (int, float) or not 1 <= width <= MAX_WIDTH:
            raise BLPSegError(f"{where}: width {str(width)[:40]!r} is not within 1..{MAX_WIDTH} pixels")
        if not isinstance(points, list) or not points or not all(isinstance(p, list) and len(p) == 2 for p in points):
            raise BLPSegError(f"{where}: points are not a list of [x, y]")
        if not all(type(v) in (int, float) for point in points for v in point):
            raise BLPSegError(f"{where}: a coordinate is no number")
        drawn = stroke.get("time", 0)
        if type(drawn) not in (int, float) or not abs(drawn) <= 1e15:
            raise BLPSegError(f"{where}: time {str(drawn)[:40]!r} is no number (seconds)")
        return {"class": number, "width": round(width), "points": points, "time": drawn}


def _pixels(where: str, photo: Photo, stroke: dict) -> np.ndarray:
    columns, rows = zip(*stroke["points"], strict=True)
    return pixel_points(where, rows, columns, photo.height, photo.width)


def _stamp(label: np.ndarray) -> bytes:
    return stamp("annotate", label.tobytes())


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
