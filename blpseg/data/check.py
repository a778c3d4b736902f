"""The doctor: is a data set sound? Reads every file once and says what is wrong, where, and how much of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from ..utils import paths
from ..utils.errors import BLPSegError
from ..utils.files import read_image, read_label
from ..utils.labels import UNANNOTATED
from ..utils.parallel import map_files
from .datasets import load_records, splits

__all__ = ["DatasetReport", "Finding", "check_datasets"]

WORST_FILES = 10

# A file's weight in the list of the worst: what stops training first, what merely misleads it last.
_SEVERITY = {
    "unreadable": 6.0,
    "missing": 6.0,
    "size": 5.0,
    "range": 4.0,
    "zero": 3.0,
    "duplicate": 2.5,
    "empty": 2.0,
    "disagreement": 1.0,
}
_MEANING = {
    "unreadable": "files that do not open",
    "missing": "images without a label file",
    "size": "labels of another size than their image",
    "range": "labels with values out of range",
    "zero": "scribbles where 0 seems to mean 'not annotated'",
    "duplicate": "images that are in more than one split",
    "empty": "scribbles without an annotated pixel",
    "disagreement": "scribbles that disagree with the dense mask",
}

# 0 seems to mean "not annotated" where it fills most of an image that has (nearly) no 255, and most of the objects of
# the dense mask or, without a mask, where the rest is strokes.
_ZERO_SHARE = 0.5
_FEW_UNANNOTATED = 0.001
_LEAST_STROKE = 5  # pixels
_STROKE_WIDTH = 0.04  # of the shorter side: what an opening of this size leaves is no stroke
_STROKE_REST = 0.3


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file.

    Attributes:
        kind: a key of the table of kinds: unreadable, missing, size, range, zero, duplicate, empty, disagreement.
        file: its path.
        message: what is wrong, without the path.
        severity: the larger the worse.
    """

    kind: str
    file: str
    message: str
    severity: float


@dataclass
class DatasetReport:
    """What was found in one split. Counts are of pixels where not said otherwise.

    Attributes:
        name, classes: of the split.
        images: how many were listed.
        sizes: "WIDTH x HEIGHT" -> images.
        scribble_pixels, mask_pixels: (C,) of each class.
        scribble_images, mask_images: (C,) images that the class occurs in.
        annotated, scribble_area: annotated pixels and all pixels of the scribbles.
        compared, disagreeing: (C,) scribbled pixels that a mask tells about, and those it contradicts.
        findings: what is wrong.
        notes: worth knowing, not wrong.
    """

    name: str
    classes: list[str]
    images: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    scribble_pixels: np.ndarray = None
    mask_pixels: np.ndarray = None
    scribble_images: np.ndarray = None
    mask_images: np.ndarray = None
    annotated: int = 0
    scribble_area: int = 0
    compared: np.ndarray = None
    disagreeing: np.ndarray = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name in _PER_CLASS:
            setattr(self, name, np.zeros(len(self.classes), np.int64))

    @property
    def healthy(self) -> bool:
        return not self.findings

    def worst(self) -> list[Finding]:
        """The worst finding of each of the ten worst files."""
        first: dict[str, Finding] = {}
        for finding in sorted(self.findings, key=lambda f: -f.severity):
            first.setdefault(finding.file, finding)
        return list(first.values())[:WORST_FILES]

    def as_dict(self) -> dict:
        """Plain numbers and strings, for JSON."""
        return {
            "name": self.name,
            "healthy": self.healthy,
            "images": self.images,
            "sizes": self.sizes,
            "annotated_share": _share(self.annotated, self.scribble_area),
            "disagreeing_share": _share(int(self.disagreeing.sum()), int(self.compared.sum())),
            "classes": {
                name: {key: int(getattr(self, key)[c]) for key in _PER_CLASS} for c, name in enumerate(self.classes)
            },
            "counts": {kind: n for kind in _SEVERITY if (n := sum(f.kind == kind for f in self.findings))},
            "findings": [vars(finding) for finding in self.findings],
            "worst": [finding.file for finding in self.worst()],
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """A table of the whole, one of the classes, the notes, and the ten worst files."""
        scribbled, masked = self.scribble_area > 0, self.mask_pixels.any()
        summary = [("images", self.images)]
        summary += [("sizes", ", ".join(f"{size} ({n})" for size, n in _most_frequent(self.sizes)) or "-")]
        if scribbled:
            summary.append(("annotated pixels", _percent(self.annotated, self.scribble_area)))
        if self.compared.any():
            summary.append(
                ("of these, contradicted by the mask", _percent(self.disagreeing.sum(), self.compared.sum()))
            )
        summary += [(meaning, sum(f.kind == kind for f in self.findings)) for kind, meaning in _MEANING.items()]
        lines = [f"== {self.name}: {'sound' if self.healthy else 'NOT SOUND'}", tabulate(summary, tablefmt="plain")]
        if scribbled or masked:
            rows = []
            for c, name in enumerate(self.classes):
                row = [c, name]
                if scribbled:
                    row += [self.scribble_images[c], _percent(self.scribble_pixels[c], self.annotated)]
                if masked:
                    row += [self.mask_images[c], _percent(self.mask_pixels[c], self.mask_pixels.sum())]
                if self.compared.any():
                    row.append(_percent(self.disagreeing[c], self.compared[c]))
                rows.append(row)
            headers = ["id", "class"]
            headers += ["scribbled images", "of scribble"] * scribbled + ["mask images", "of masks"] * bool(masked)
            headers += ["contradicted"] * bool(self.compared.any())
            lines += ["", tabulate(rows, headers, tablefmt="simple")]
        lines += [f"note: {note}" for note in self.notes]
        if self.findings:
            lines += ["", f"the worst {min(WORST_FILES, len(self.worst()))} files:"]
            lines += [f"  {finding.file}: {finding.message}" for finding in self.worst()]
        return "\n".join(lines)


_PER_CLASS = ("scribble_pixels", "mask_pixels", "scribble_images", "mask_images", "compared", "disagreeing")


def check_datasets(
    names: Sequence[str], *, workers: int | None = None, max_disagreement: float = 0.05
) -> list[DatasetReport]:
    """Read every file of some splits and report what is wrong with each.

    Args:
        names: in the catalogs; images are compared between them for duplicates.
        workers: processes.
        max_disagreement: share of a scribble's pixels that the dense mask may contradict before that is wrong.

    Returns:
        A report for each name, in order.

    Raises:
        BLPSegError: a name is not registered, or a worker was killed. What is missing on disk is a finding.
    """
    reports, digests = [], {}
    for name in names:
        if name not in DatasetCatalog:
            load_records(name)  # raises and says which there are
        metadata = MetadataCatalog.get(name)
        report = DatasetReport(name, list(metadata.get("stuff_classes", ())))
        reports.append(report)
        if len(report.classes) < 2:
            report.findings.append(_finding("range", name, "its metadata has no stuff_classes"))
            continue
        try:
            records = load_records(name, optional=("images", "scribbles", "masks"), sizes=False)
        except BLPSegError as error:
            path, _, message = str(error).partition(": ")
            report.findings.append(_finding("missing", path, message or path))
            continue
        report.images = len(records)
        examine = partial(
            _examine,
            num_classes=len(report.classes),
            ignore_label=metadata.get("ignore_label", UNANNOTATED),
            max_disagreement=max_disagreement,
            labels=_expected_labels(name, records),
        )
        for record, result in map_files(examine, records, workers, name):
            if isinstance(result, BLPSegError):
                result = {"findings": [_finding("unreadable", record["file_name"], _without_path(result, record))]}
            _add(report, result)
            if "digest" in result:
                digests.setdefault(result["digest"], []).append((report, record["file_name"]))
        _note(report)
    _find_duplicates(digests)
    return reports


def _expected_labels(name: str, records: Sequence[dict]) -> tuple[str, ...]:
    """The labels that every record must have: scribbles where any split of that kind has them, else masks."""
    split = splits().get(name)
    if split is not None:
        if split.skip_unannotated:
            return ()
        return ("scribble_file_name",) if split.scribbles else ("sem_seg_file_name",)
    keys = [key for key in ("scribble_file_name", "sem_seg_file_name") if any(key in record for record in records)]
    return tuple(keys[:1]) or ("sem_seg_file_name",)


def _examine(
    record: dict, *, num_classes: int, ignore_label: int, max_disagreement: float, labels: tuple[str, ...]
) -> dict:
    """Read one record's files: counts, a digest of the image's pixels, findings."""
    findings: list[Finding] = []
    result = {"findings": findings}
    size = None
    try:
        image = read_image(record["file_name"])
        size = image.shape[:2]
        result["size"] = f"{size[1]} x {size[0]}"
        result["digest"] = hashlib.blake2b(repr(size).encode() + image.tobytes(), digest_size=16).digest()
    except BLPSegError as error:
        findings.append(_finding("unreadable", record["file_name"], _without_path(error, record)))

    maps = {}
    for key, part in (("scribble_file_name", "scribble"), ("sem_seg_file_name", "mask")):
        path = record.get(key)
        if path is None:
            if key in labels:
                findings.append(_finding("missing", record["file_name"], f"has no {part}"))
            continue
        try:
            label = read_label(path)
        except BLPSegError as error:
            findings.append(_finding("unreadable", path, _without_path(error, record)))
            continue
        if size is not None and label.shape != size:
            findings.append(
                _finding("size", path, f"{label.shape[1]} x {label.shape[0]} pixels, its image {size[1]} x {size[0]}")
            )
        counts = np.bincount(label.ravel(), minlength=256)
        unlabelled = {UNANNOTATED} if part == "scribble" else {UNANNOTATED, ignore_label}
        bad = [v for v in range(num_classes, 256) if counts[v] and v not in unlabelled]
        if bad:
            findings.append(_finding("range", path, _out_of_range(bad, counts, num_classes, part)))
        result[f"{part}_pixels"] = np.where(np.isin(np.arange(num_classes), list(unlabelled)), 0, counts[:num_classes])
        maps[part] = label

    if "scribble" in maps:
        scribble = maps["scribble"]
        annotated = int(result["scribble_pixels"].sum())
        result["annotated"], result["scribble_area"] = annotated, scribble.size
        path = record["scribble_file_name"]
        if annotated == 0:
            findings.append(_finding("empty", path, "no annotated pixel"))
        elif _zero_means_unannotated(scribble, maps.get("mask"), num_classes):
            findings.append(
                _finding(
                    "zero", path, "255 is absent and 0 fills all but some strokes: save 'not annotated' as 255, not 0"
                )
            )
        if "mask" in maps and maps["mask"].shape == scribble.shape:
            _compare(result, scribble, maps["mask"], num_classes, ignore_label, max_disagreement, path)
    return result


def _compare(result, scribble, mask, num_classes, ignore_label, max_disagreement, path) -> None:
    told = (scribble < num_classes) & (mask < num_classes) & (mask != ignore_label)
    wrong = told & (scribble != mask)
    result["compared"] = np.bincount(scribble[told], minlength=num_classes)
    result["disagreeing"] = np.bincount(scribble[wrong], minlength=num_classes)
    share = wrong.sum() / max(1, told.sum())
    if share > max_disagreement:
        message = f"{share:.1%} of its {told.sum()} pixels disagree with the mask"
        result["findings"].append(
            _finding("disagreement", path, message + _shift_hint(scribble, mask, told, share), share)
        )


def _shift_hint(scribble: np.ndarray, mask: np.ndarray, told: np.ndarray, share: float) -> str:
    """Whether the strokes would fit if they were moved, mirrored or transposed."""
    rows, columns = np.nonzero(told)
    height, width = mask.shape
    moves = {
        f"moved by {dy} rows and {dx} columns": (rows + dy, columns + dx)
        for dy in range(-2, 3)
        for dx in range(-2, 3)
        if dy or dx
    }
    moves["mirrored left to right"] = (rows, width - 1 - columns)
    moves["turned upside down"] = (height - 1 - rows, columns)
    if height == width:
        moves["transposed (x and y exchanged)"] = (columns, rows)
    shares = {}
    for name, (y, x) in moves.items():
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        if inside.any():
            shares[name] = (scribble[rows, columns][inside] != mask[y[inside], x[inside]]).mean()
    best = min(shares, key=shares.get, default=None)
    return f"; {best} only {shares[best]:.1%} would" if best and shares[best] < share / 4 else ""


def _zero_means_unannotated(scribble: np.ndarray, mask: np.ndarray | None, num_classes: int) -> bool:
    if (scribble == UNANNOTATED).mean() > _FEW_UNANNOTATED or (scribble == 0).mean() < _ZERO_SHARE:
        return False
    marked = ((scribble > 0) & (scribble < num_classes)).astype(np.uint8)
    if not marked.any():
        return False  # an empty scene, densely labelled
    if mask is not None and mask.shape == scribble.shape:
        objects = (mask > 0) & (mask < num_classes)
        return bool((scribble[objects] == 0).mean() > _ZERO_SHARE) if objects.any() else False
    side = max(_LEAST_STROKE, round(_STROKE_WIDTH * min(scribble.shape))) | 1
    rest = cv2.morphologyEx(marked, cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    return rest.sum() < _STROKE_REST * marked.sum()


def _out_of_range(bad: list[int], counts: np.ndarray, num_classes: int, part: str) -> str:
    pixels = int(counts[bad].sum())
    shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    message = f"{pixels} pixels have the values {shown}; classes are 0..{num_classes - 1}"
    if part == "scribble" and bad == [num_classes] and counts[num_classes] > 0.5 * counts.sum():
        message += f"; {num_classes} seems to mean 'not annotated', which is 255 here"
    return message


def _add(report: DatasetReport, result: dict) -> None:
    report.findings += result["findings"]
    if "size" in result:
        report.sizes[result["size"]] = report.sizes.get(result["size"], 0) + 1
    for part in ("scribble", "mask"):
        if f"{part}_pixels" in result:
            pixels = result[f"{part}_pixels"]
            getattr(report, f"{part}_pixels")[:] += pixels
            getattr(report, f"{part}_images")[:] += pixels > 0
    report.annotated += result.get("annotated", 0)
    report.scribble_area += result.get("scribble_area", 0)
    for key in ("compared", "disagreeing"):
        if key in result:
            getattr(report, key)[:] += result[key]


def _note(report: DatasetReport) -> None:
    split = splits().get(report.name)
    for part in ("scribbles", "masks"):
        if split is not None and split.path(part) and not paths.isdir(split.path(part)):
            report.notes.append(f"{split.path(part)}: no such folder; {split.remedy(part)}")
    for part in ("scribble", "mask"):
        pixels = getattr(report, f"{part}_pixels")
        absent = [name for name, count in zip(report.classes, pixels, strict=True) if not count]
        if pixels.any() and absent:
            report.notes.append(f"no {part} has a pixel of: {', '.join(absent)}")


def _find_duplicates(digests: dict[bytes, list[tuple[DatasetReport, str]]]) -> None:
    """An image of several splits is a finding in each; within a split it is a note."""
    repeated: dict[str, int] = {}
    reports = {}
    for places in digests.values():
        if len({report.name for report, _ in places}) > 1:
            for report, path in places:
                other = next(f for r, f in places if r.name != report.name)
                if other == path:
                    message = "the same file is listed in another split"
                else:
                    message = f"the same picture as {other} of another split"
                report.findings.append(_finding("duplicate", path, message))
        elif len(places) > 1:
            report = places[0][0]
            reports[report.name] = report
            repeated[report.name] = repeated.get(report.name, 0) + len(places) - 1
    for name, count in repeated.items():
        reports[name].notes.append(f"{count} pictures occur more than once in this split")


def _finding(kind: str, file: str, message: str, excess: float = 0.0) -> Finding:
    return Finding(kind, file, message, _SEVERITY[kind] + excess)


def _without_path(error: BLPSegError, record: dict) -> str:
    message = str(error)
    for path in record.values():
        if isinstance(path, str):
            message = message.removeprefix(f"{path}: ")
    return message


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"


def _most_frequent(counts: dict[str, int], most: int = 4) -> list[tuple[str, int]]:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    rest = sum(n for _, n in ordered[most:])
    return ordered[:most] + ([("others", rest)] if rest else [])
