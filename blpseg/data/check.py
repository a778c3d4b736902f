"""The doctor: is a data set sound? Reads every file once and says what is wrong, where, and how much of it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from functools import partial

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..utils.errors import BLPSegError
from ..utils.files import index_folder, read_image, read_label
from ..utils.labels import UNANNOTATED
from ..utils.made import classes_of
from ..utils.parallel import map_files
from .check_report import DatasetReport, finding
from .datasets import load_records, splits

_LABEL_SUFFIX = re.compile(r"[-_. ]?(mask|label|labels|labelids|scribble|scribbles|gt|seg|annotation)$", re.IGNORECASE)

# 0 seems to mean "not annotated" where it fills most of an image that has (nearly) no 255, and most of the objects of
# the dense mask or, without a mask, where the rest is strokes.
_ZERO_SHARE = 0.5
_FEW_UNANNOTATED = 0.001
_LEAST_STROKE = 5  # pixels
_STROKE_WIDTH = 0.04  # of the shorter side: what an opening of this size leaves is no stroke
_STROKE_REST = 0.3


def check_datasets(
    names: Sequence[str],
    *,
    num_classes: int | None = None,
    workers: int | None = None,
    max_disagreement: float = 0.05,
) -> list[DatasetReport]:
    """Read every file of some splits and report what is wrong with each, in order.

    Args:
        names: in the catalogs; images are compared between them for duplicates.
        num_classes: of the model; the data sets must have as many.
        workers: processes.
        max_disagreement: share of a scribble's pixels that the dense mask may contradict before that is wrong.

    Raises:
        BLPSegError: a name is not registered, or a worker was killed. What is missing on disk is a finding.
    """
    digests: dict[bytes, list[tuple[DatasetReport, str]]] = {}
    reports = []
    for name in names:
        if name not in DatasetCatalog:
            load_records(name)  # raises and says which there are
        report = DatasetReport(name, list(MetadataCatalog.get(name).get("stuff_classes", ())))
        reports.append(report)
        if len(report.classes) < 2:
            report.findings.append(finding("classes", name, "its metadata has no stuff_classes"))
            continue
        if num_classes not in (None, len(report.classes)):
            message = (
                f"has {len(report.classes)} classes, MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}; set "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {len(report.classes)}, or mend the list of classes"
            )
            report.findings.append(finding("classes", name, message))
        try:
            records = load_records(name, optional=("images", "scribbles", "masks"), sizes=False)
        except BLPSegError as error:
            path, _, message = str(error).partition(": ")
            report.findings.append(finding("missing", path, message or path))
            continue
        _read_all(report, records, digests, workers, max_disagreement)
    _find_duplicates(digests)
    return reports


def _read_all(report, records, digests, workers, max_disagreement) -> None:
    label_files = _label_files(report.name)
    examine = partial(
        _examine,
        name=report.name,
        classes=report.classes,
        ignore_label=MetadataCatalog.get(report.name).get("ignore_label", UNANNOTATED),
        max_disagreement=max_disagreement,
        labels=_expected_labels(report.name, records),
        similar=_similar_names(records, label_files),
    )
    _find_stray_labels(report, records, label_files)
    for record, result in map_files(examine, records, workers, report.name):
        if isinstance(result, BLPSegError):
            report.images += 1
            report.findings.append(finding("unreadable", record["file_name"], _without_path(result, record)))
            continue
        found, digest = result
        report.add(found)
        if digest:
            digests.setdefault(digest, []).append((report, record["file_name"]))
    _note(report)


def _label_files(name: str) -> list[tuple[str, str]]:
    """Stem and path of every file in a split's folders of labels."""
    split = splits().get(name)
    folders = [split.path(part) for part in ("scribbles", "masks")] if split is not None else []
    return [file for folder in folders if os.path.isdir(folder) for file in index_folder(folder).items()]


def _similar_names(records: Sequence[dict], label_files: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Image file -> what to do about a label that is named nearly as it: ``x_mask.png`` for ``x.jpg``."""
    images = {os.path.splitext(os.path.basename(record["file_name"]))[0]: record["file_name"] for record in records}
    hints = {}
    for stem, path in images.items():
        named = _LABEL_SUFFIX.sub("", stem)
        if named != stem and named in images:
            image = os.path.basename(images[named])
            hints[path] = f"seems to be the label of {image}: labels lie in a folder of their own, as {named}.png"
    for label, path in label_files:
        named = _LABEL_SUFFIX.sub("", label)
        if named != label and named in images and label not in images:
            hints.setdefault(images[named], f"{path} seems to be it: labels have the image's name, {named}.png")
    return hints


def _find_stray_labels(report: DatasetReport, records: Sequence[dict], label_files: Sequence[tuple[str, str]]) -> None:
    """Labels of no image, in the folders of a split that takes all images of a folder; and how many have a scribble."""
    split = splits().get(report.name)
    if split is None or split.names:
        return
    stems = {record["image_id"] for record in records}
    for stem, path in label_files:
        if stem not in stems:
            report.findings.append(finding("stray", path, "no image has this name without its extension"))
    if split.skip_unannotated and split.needed == "scribbles":
        count = sum("scribble_file_name" in record for record in records)
        if not count:
            report.findings.append(finding("missing", split.path("scribbles"), "no image has a scribble"))
        elif count < len(records):
            report.notes.append(f"{count} of {len(records)} images have a scribble; the others are not trained on")


def _expected_labels(name: str, records: Sequence[dict]) -> tuple[str, ...]:
    """The labels that every record must have: scribbles where any split of that kind has them, else masks."""
    split = splits().get(name)
    if split is not None:
        if split.needed == "masks":
            return ("sem_seg_file_name",)
        return () if split.skip_unannotated else ("scribble_file_name",)
    keys = [key for key in ("scribble_file_name", "sem_seg_file_name") if any(key in record for record in records)]
    return tuple(keys[:1]) or ("sem_seg_file_name",)


def _examine(
    record: dict,
    *,
    name: str,
    classes: list[str],
    ignore_label: int,
    max_disagreement: float,
    labels: tuple[str, ...],
    similar: dict[str, str],
) -> tuple[DatasetReport, bytes]:
    """Read one record's files: what was found, and a digest of the image's pixels."""
    report = DatasetReport(name, classes, images=1)
    num_classes, size, digest = len(classes), None, b""

    def wrong(kind: str, path: str, message: str) -> None:
        report.findings.append(finding(kind, path, message))

    try:
        image = read_image(record["file_name"])
        size = image.shape[:2]
        report.sizes[f"{size[1]} x {size[0]}"] += 1
        digest = hashlib.blake2b(repr(size).encode() + image.tobytes(), digest_size=16).digest()
    except BLPSegError as error:
        wrong("unreadable", record["file_name"], _without_path(error, record))

    maps = {}
    for key, part in (("scribble_file_name", "scribble"), ("sem_seg_file_name", "mask")):
        path = record.get(key)
        if path is None:
            if key in labels:
                hint = similar.get(record["file_name"])
                wrong("missing", record["file_name"], f"has no {part}" + (f"; {hint}" if hint else ""))
            continue
        try:
            label = maps[part] = read_label(path)
        except BLPSegError as error:
            wrong("unreadable", path, _without_path(error, record))
            continue
        if size is not None and label.shape != size:
            wrong("size", path, f"{label.shape[1]} x {label.shape[0]} pixels, its image {size[1]} x {size[0]}")
        counts = np.bincount(label.ravel(), minlength=256)
        unlabelled = [UNANNOTATED] if part == "scribble" else [UNANNOTATED, ignore_label]
        counts_of_classes = np.where(np.isin(np.arange(num_classes), unlabelled), 0, counts[:num_classes])
        setattr(report, f"{part}_pixels", counts_of_classes)
        setattr(report, f"{part}_images", (counts_of_classes > 0).astype(np.int64))
        if bad := [v for v in range(num_classes, 256) if counts[v] and v not in unlabelled]:
            wrong("range", path, _out_of_range(bad, counts, num_classes, part))

    if "scribble" in maps:
        path = record["scribble_file_name"]
        _examine_scribble(report, path, maps)
        if "mask" in maps and maps["mask"].shape == maps["scribble"].shape and report.annotated:
            _compare(report, maps["scribble"], maps["mask"], ignore_label, max_disagreement, path)
    return report, digest


def _examine_scribble(report: DatasetReport, path: str, maps: dict[str, np.ndarray]) -> None:
    scribble, classes = maps["scribble"], report.classes
    report.annotated, report.scribble_area = int(report.scribble_pixels.sum()), scribble.size
    other = [(n, name) for n, name in classes_of(path).items() if n < len(classes) and name != classes[n]]
    if other:
        number, name = other[0]
        message = (
            f"made with a vocabulary in which {number} is {name!r}, but class {number} of the config is "
            f"{classes[number]!r}; give both the same order, best by one file as DATASETS.FOLDER.CLASSES_FILE and "
            "--vocabulary"
        )
        report.findings.append(finding("classes", path, message))
    if not report.annotated:
        report.findings.append(finding("empty", path, "no annotated pixel"))
        return
    report.stroke_widths[round(_stroke_width(scribble != UNANNOTATED))] += 1
    if message := _zero_means_unannotated(scribble, maps.get("mask"), len(classes)):
        report.findings.append(finding("zero", path, message))


def _stroke_width(drawn: np.ndarray) -> float:
    """Area by length: a stroke has two pixels of outline for each of its length, one of width 1 only one."""
    outline = drawn & ~cv2.erode(drawn.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0).astype(bool)
    return max(1.0, 2 * drawn.sum() / outline.sum() - (outline.sum() == drawn.sum())) if drawn.any() else 0.0


def _compare(report: DatasetReport, scribble, mask, ignore_label: int, max_disagreement: float, path: str) -> None:
    num_classes = len(report.classes)
    comparable = (scribble < num_classes) & (mask < num_classes) & (mask != ignore_label)
    wrong = comparable & (scribble != mask)
    report.compared = np.bincount(scribble[comparable], minlength=num_classes)
    report.disagreeing = np.bincount(scribble[wrong], minlength=num_classes)
    share = wrong.sum() / max(1, comparable.sum())
    if share > max_disagreement:
        message = f"{share:.1%} of its {comparable.sum()} pixels disagree with the mask"
        message += _shift_hint(scribble, mask, comparable, share)
        report.findings.append(finding("disagreement", path, message, share))


def _shift_hint(scribble: np.ndarray, mask: np.ndarray, comparable: np.ndarray, share: float) -> str:
    """Whether the strokes would fit if they were moved, mirrored or transposed."""
    rows, columns = np.nonzero(comparable)
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


def _zero_means_unannotated(scribble: np.ndarray, mask: np.ndarray | None, num_classes: int) -> str:
    """What is wrong if 0 seems to mean "not annotated", else ""."""
    if (scribble == 0).mean() < _ZERO_SHARE:
        return ""
    marked, full = (scribble > 0) & (scribble < num_classes), scribble == UNANNOTATED
    swapped = full.mean() > _FEW_UNANNOTATED
    if not marked.any():
        return ""  # an empty scene, densely labelled
    if mask is not None and mask.shape == scribble.shape:
        objects = (mask > 0) & (mask < num_classes)
        unlike = objects.any() and (scribble[objects] == 0).mean() > _ZERO_SHARE
        if swapped:
            unlike = unlike and (mask[full] == 0).mean() > _ZERO_SHARE
    else:
        unlike = _is_strokes(marked) and (not swapped or _is_strokes(full))
    if not unlike:
        return ""
    if swapped:
        return "0 and 255 seem to be swapped: 'not annotated' is 255, class 0 is 0"
    return (
        "255 is absent and 0 fills all but some strokes: save 'not annotated' as 255, not 0 "
        "(datasets/prepare_scribbles.py --label-png DIR --unannotated-value 0)"
    )


def _is_strokes(marked: np.ndarray) -> bool:
    """Whether little of some pixels is wider than a stroke."""
    side = max(_LEAST_STROKE, round(_STROKE_WIDTH * min(marked.shape))) | 1
    rest = cv2.morphologyEx(marked.astype(np.uint8), cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    return bool(rest.sum() < _STROKE_REST * marked.sum())


def _out_of_range(bad: list[int], counts: np.ndarray, num_classes: int, part: str) -> str:
    pixels = int(counts[bad].sum())
    shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    message = f"{pixels} pixels have the values {shown}; classes are 0..{num_classes - 1}"
    if part == "scribble" and bad == [num_classes] and counts[num_classes] > 0.5 * counts.sum():
        message += f"; {num_classes} seems to mean 'not annotated', which is 255 here"
    elif part == "mask" and len(bad) == 1:
        message += f"; if {bad[0]} stands for 'no class', set DATASETS.FOLDER.IGNORE_LABEL {bad[0]}"
    return message


def _note(report: DatasetReport) -> None:
    split = splits().get(report.name)
    for part in ("scribbles", "masks"):
        if split is None or (split.evaluated and part != split.needed):  # one of the two is enough to evaluate by
            continue
        if split.path(part) and not os.path.isdir(split.path(part)):
            report.notes.append(f"{split.path(part)}: no such folder; {split.remedy(part)}")
    for part in ("scribble", "mask"):
        pixels = getattr(report, f"{part}_pixels")
        absent = [name for name, count in zip(report.classes, pixels, strict=True) if not count]
        if pixels.any() and not pixels[1:].any():
            message = (
                f"no {part} has a class but {report.classes[0]!r}; where a program such as Fiji wrote objects as 255, "
                "give them class numbers: 255 stands for 'no class' here"
            )
            report.findings.append(finding("classes", report.name, message))
        elif pixels.any() and absent:
            report.notes.append(f"no {part} has a pixel of: {', '.join(absent)}")

    widths = sorted(report.stroke_widths.elements())
    if widths:
        narrow, wide = widths[len(widths) // 10], widths[-1 - len(widths) // 10]
        if wide >= 2 * narrow:
            report.notes.append(
                f"strokes are {narrow} pixels wide in some scribbles and {wide} in others; are simulated and drawn "
                "ones mixed? (--width of simulate_scribbles.py and prepare_scribbles.py)"
            )


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
                report.findings.append(finding("duplicate", path, message))
        elif len(places) > 1:
            report = places[0][0]
            reports[report.name] = report
            repeated[report.name] = repeated.get(report.name, 0) + len(places) - 1
    for name, count in repeated.items():
        reports[name].notes.append(f"{count} pictures occur more than once in this split")


def _without_path(error: BLPSegError, record: dict) -> str:
    message = str(error)
    for path in record.values():
        if isinstance(path, str):
            message = message.removeprefix(f"{path}: ")
    return message
