"""What the doctor of data sets has found, as text for people and as numbers for JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

import numpy as np
from tabulate import tabulate

from ..utils.errors import printable

WORST_FILES = 10

# Kind -> weight in the list of the worst files (what stops training first, what merely misleads it last), and meaning.
_KINDS = {
    "unreadable": (6.0, "files that do not open"),
    "missing": (6.0, "images without a label file"),
    "size": (5.0, "labels of another size than their image"),
    "classes": (4.5, "classes that do not agree with the config"),
    "stray": (4.2, "label files that belong to no image"),
    "range": (4.0, "labels with values out of range"),
    "zero": (3.0, "scribbles where 0 seems to mean 'not annotated'"),
    "duplicate": (2.5, "images that are in more than one split"),
    "empty": (2.0, "scribbles without an annotated pixel"),
    "disagreement": (1.0, "scribbles that disagree with the dense mask"),
}
_PER_CLASS = ("scribble_pixels", "mask_pixels", "scribble_images", "mask_images", "compared", "disagreeing")


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file, ``message`` without its path; ``kind`` is a key of the table above."""

    kind: str
    file: str
    message: str
    severity: float  # the larger the worse


@dataclass
class DatasetReport:
    """What was found in one split, or in some of its records. Counts are of pixels where not said otherwise.

    Attributes:
        name, classes: of the split.
        images: how many were listed.
        sizes: "WIDTH x HEIGHT" -> images.
        scribble_pixels, mask_pixels: (C,) of each class.
        scribble_images, mask_images: (C,) images that the class occurs in.
        annotated, scribble_area: annotated pixels and all pixels of the scribbles.
        compared, disagreeing: (C,) scribbled pixels that have a class in the mask, and those with another class there.
        stroke_widths: width in pixels, estimated -> scribbles.
        findings: what is wrong.
        notes: worth knowing, not wrong.
    """

    name: str
    classes: list[str]
    images: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    scribble_pixels: np.ndarray = None
    mask_pixels: np.ndarray = None
    scribble_images: np.ndarray = None
    mask_images: np.ndarray = None
    annotated: int = 0
    scribble_area: int = 0
    compared: np.ndarray = None
    disagreeing: np.ndarray = None
    stroke_widths: Counter[int] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name in _PER_CLASS:
            setattr(self, name, np.zeros(len(self.classes), np.int64))

    def add(self, other: DatasetReport) -> None:
        """Add what was found in further records of the split."""
        for counted in fields(self)[2:]:  # behind name and classes
            setattr(self, counted.name, getattr(self, counted.name) + getattr(other, counted.name))

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
            "classes": {n: {key: int(getattr(self, key)[c]) for key in _PER_CLASS} for c, n in enumerate(self.classes)},
            "counts": {kind: n for kind in _KINDS if (n := sum(f.kind == kind for f in self.findings))},
            "findings": [vars(finding) for finding in self.findings],
            "worst": [finding.file for finding in self.worst()],
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """A table of the whole, one of the classes, the notes, and the ten worst files."""
        scribbled, masked = self.scribble_area > 0, self.mask_pixels.any()
        summary = [("images", self.images)]
        sizes = self.sizes.most_common(4)
        sizes += [("others", rest)] if (rest := self.sizes.total() - sum(n for _, n in sizes)) else []
        summary.append(("sizes", ", ".join(f"{size} ({n})" for size, n in sizes) or "-"))
        if scribbled:
            summary.append(("annotated pixels", _percent(self.annotated, self.scribble_area)))
        if self.compared.any():
            summary.append(
                ("of these, contradicted by the mask", _percent(self.disagreeing.sum(), self.compared.sum()))
            )
        summary += [(meaning, sum(f.kind == kind for f in self.findings)) for kind, (_, meaning) in _KINDS.items()]
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
    return Finding(kind, file, message, _KINDS[kind][0] + excess)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"
