"""What the doctor of data sets has found, as text for people and as numbers for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tabulate import tabulate

from ..utils.errors import printable

__all__ = ["DatasetReport", "Finding", "finding"]

WORST_FILES = 10

# A file's weight in the list of the worst: what stops training first, what merely misleads it last.
_SEVERITY = {
    "unreadable": 6.0,
    "missing": 6.0,
    "size": 5.0,
    "classes": 4.5,
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
    "classes": "classes that do not agree with the config",
    "range": "labels with values out of range",
    "zero": "scribbles where 0 seems to mean 'not annotated'",
    "duplicate": "images that are in more than one split",
    "empty": "scribbles without an annotated pixel",
    "disagreement": "scribbles that disagree with the dense mask",
}
_PER_CLASS = ("scribble_pixels", "mask_pixels", "scribble_images", "mask_images", "compared", "disagreeing")


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file.

    Attributes:
        kind: a key of the table of kinds: unreadable, missing, size, classes, range, zero, duplicate, empty,
            disagreement.
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
        stroke_widths: width in pixels, estimated -> scribbles.
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
    stroke_widths: dict[int, int] = field(default_factory=dict)
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
        lines += [f"note: {printable(note)}" for note in self.notes]
        if self.findings:
            lines += ["", f"the worst {min(WORST_FILES, len(self.worst()))} files:"]
            lines += ["  " + printable(f"{finding.file}: {finding.message}") for finding in self.worst()]
        return "\n".join(lines)


def finding(kind: str, file: str, message: str, excess: float = 0.0) -> Finding:
    """A finding whose severity is that of its kind, and a little more."""
    return Finding(kind, file, message, _SEVERITY[kind] + excess)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"


def _most_frequent(counts: dict[str, int], most: int = 4) -> list[tuple[str, int]]:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    rest = sum(n for _, n in ordered[most:])
    return ordered[:most] + ([("others", rest)] if rest else [])
