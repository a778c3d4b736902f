"""Vocabularies: the class numbers of names and colours in annotations."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field

import yaml

from ..utils.errors import BLPSegError, describe
from ..utils.files import read_bytes
from ..utils.labels import UNANNOTATED

# The names that PASCAL-Scribble uses, in order of their class numbers (METHOD section 8).
VOC_NAMES = (
    "background plane bike bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep sofa "
    "train monitor"
).split()
_CONTEXT_ONLY = (
    "bag bed bench book building cabinet ceiling cloth computer cup door fence floor flower food grass ground keyboard "
    "light mountain mouse curtain platform sign plate road rock shelves sidewalk sky snow bedclothes track tree truck "
    "wall water window wood"
).split()
CONTEXT_NAMES = VOC_NAMES + _CONTEXT_ONLY

_LARGEST_FILE = 1 << 18  # bytes
_LONGEST_COLOR, _LONGEST_NAME = 40, 200  # characters
_HEX_COLOR = re.compile(r"#([0-9a-fA-F]{6})$")
_RGB_COLOR = re.compile(r"[(\[]?\s*(\d{1,3})\s*[, ]\s*(\d{1,3})\s*[, ]\s*(\d{1,3})\s*[)\]]?$")
_FORM = (
    'a vocabulary is YAML: `NAME: NUMBER`, `NAME: {id: NUMBER, color: "#rrggbb"}` or `"#rrggbb": NUMBER or NAME` '
    "a line, or a list of names or colours numbered from 0 (docs/SCRIBBLES.md)"
)


@dataclass(frozen=True)
class Vocabulary:
    """Class numbers by name and by colour.

    Attributes:
        source: where it comes from, for messages.
        ids: name -> class number 0..254.
        colors: (r, g, b) -> class number 0..254, or 255 for "not annotated".
    """

    source: str
    ids: dict[str, int] = field(default_factory=dict)
    colors: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def class_id(self, name: str, where: str) -> int:
        """The number of a class.

        Raises:
            BLPSegError: ``where`` uses a name that the vocabulary lacks.
        """
        try:
            return self.ids[name]
        except KeyError:
            near = difflib.get_close_matches(name[:100], self.ids, n=1)
            raise BLPSegError(
                f"{where}: class {name[:100]!r} is not in the vocabulary {self.source}"
                + (f" (did you mean {near[0]!r}?)" if near else "")
                + "; correct the name or give a vocabulary file that has it"
            ) from None


def load_vocabulary(name_or_path: str) -> Vocabulary:
    """``"voc"`` (21 classes), ``"context"`` (60 classes), or a vocabulary file.

    The file is YAML. A mapping names the classes, as ``NAME: NUMBER`` or ``NAME: {id: NUMBER, color: COLOR}``, where
    COLOR is ``"#rrggbb"``, ``[r, g, b]`` or a list of such; ``COLOR: NUMBER`` or ``COLOR: NAME`` gives further
    colours, ``COLOR: unannotated`` marks pixels without a stroke. Several names may share a number. A list, or plain
    lines, of names or colours is numbered from 0; so are the classes of a project's ``config.yaml`` and of a
    ``CLASSES_FILE``. The built-in vocabularies have the VOC colour map as their colours.

    Raises:
        BLPSegError: the file is missing or not of that form; the line is named.
    """
    if name_or_path in ("voc", "context"):
        names = VOC_NAMES if name_or_path == "voc" else CONTEXT_NAMES
        colors = {voc_color(number): number for number in [*range(len(names)), UNANNOTATED]}
        return Vocabulary(name_or_path, {name: number for number, name in enumerate(names)}, colors)
    if not os.path.isfile(name_or_path):
        raise BLPSegError(f"vocabulary {name_or_path!r}: no such file, nor one of 'voc' and 'context'")
    return _Reader(name_or_path).vocabulary


def voc_color(number: int) -> tuple[int, int, int]:
    """The colour of a class in PASCAL VOC's palette: bits 0, 3, 6 of the number lead red, 1, 4, 7 green, 2, 5 blue."""
    red, green, blue = (sum((number >> (3 * k + channel) & 1) << (7 - k) for k in range(3)) for channel in range(3))
    return red, green, blue


def _class_list(root: yaml.Node | None) -> yaml.Node | None:
    """The list of names in a CLASSES_FILE or in the config of a folder; any other file's root as it is."""
    for keys in (("classes",), ("DATASETS", "FOLDER", "CLASSES")):
        node = root
        for key in keys:
            entries = node.value if isinstance(node, yaml.MappingNode) else ()
            node = next((value for name, value in entries if name.value == key), None)
        if isinstance(node, yaml.SequenceNode):
            return node
    return root


class _Reader:
    # Works on YAML nodes rather than values: they know their line, and `no` stays a name.
    def __init__(self, path: str):
        self.path = path
        self.ids: dict[str, int] = {}
        self.colors: dict[tuple[int, int, int], int] = {}
        try:
            data = read_bytes(path, _LARGEST_FILE)
            text = data.decode("utf-8-sig")
            lines = [line.strip() for line in text.splitlines()]
            lines = [line for line in lines if line and (line[0] != "#" or _HEX_COLOR.match(line))]
            plain = not any(":" in line or line[0] in "-[{" for line in lines)
            root = None if plain else yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise BLPSegError(f"{path}: not YAML ({describe(error)}); {_FORM}") from error
        root = _class_list(root)
        if isinstance(root, yaml.MappingNode):
            self.read_mapping(root)
        elif isinstance(root, yaml.SequenceNode):
            for number, node in enumerate(root.value):
                self.add(node, number)
        elif root is not None:
            self.fail(root, "neither a mapping nor a list")
        else:
            mark = yaml.Mark(path, 0, 0, 0, None, 0)
            for number, line in enumerate(lines):
                self.add(yaml.ScalarNode("", line, mark), number)
        if not self.ids and not self.colors:
            raise BLPSegError(f"{path}: names no class; {_FORM}")
        self.vocabulary = Vocabulary(os.path.basename(path), self.ids, self.colors)

    def read_mapping(self, root):
        by_name = []
        for key, value in root.value:
            color = self.color(key)
            if color is None and isinstance(value, yaml.MappingNode):
                entry = {self.text(k): v for k, v in value.value}
                unknown = set(entry) - {"id", "color", "colors"}
                if "id" not in entry or unknown:
                    self.fail(value, f"an entry has `id` and may have `color`, not {sorted(entry)}")
                number = self.number(entry.pop("id"))
                self.add(key, number)
                for node in entry.values():
                    self.add_colors(node, number)
            elif color is None:
                self.add(key, self.number(value))
            else:
                by_name.append((key, value))
        for key, value in by_name:  # after the names that they may refer to
            name = self.text(value)
            if name in self.ids:
                self.add(key, self.ids[name])
            else:
                self.add(key, UNANNOTATED if name in ("unannotated", "255") else self.number(value))

    def add_colors(self, node, number):
        if self.color(node) is not None:
            self.add(node, number)
        elif isinstance(node, yaml.SequenceNode) and node.value:
            for child in node.value:
                if self.color(child) is None:
                    self.fail(child, "not a colour")
                self.add(child, number)
        else:
            self.fail(node, "not a colour")

    def add(self, node, number):
        color = self.color(node)
        table, key = (self.ids, self.text(node)) if color is None else (self.colors, color)
        if number > 254 and not (color is not None and number == UNANNOTATED):
            self.fail(node, f"class number {number}: numbers are 0..254, since 255 means not annotated")
        if key in table:
            self.fail(node, f"{key!r} occurs twice")
        if not key or len(key) > _LONGEST_NAME:
            self.fail(node, f"a name has 1 to {_LONGEST_NAME} characters")
        table[key] = number

    def color(self, node) -> tuple[int, int, int] | None:
        if isinstance(node, yaml.SequenceNode):
            text = ",".join(child.value for child in node.value if isinstance(child, yaml.ScalarNode))
            text = text if len(node.value) == 3 else ""
        else:
            text = node.value.strip() if isinstance(node, yaml.ScalarNode) else ""
        if len(text) > _LONGEST_COLOR:
            return None
        if match := _HEX_COLOR.match(text):
            red, green, blue = bytes.fromhex(match[1])
            return red, green, blue
        if match := _RGB_COLOR.match(text):
            red, green, blue = map(int, match.groups())
            if max(red, green, blue) > 255:
                self.fail(node, f"colour {(red, green, blue)}: channels are 0..255")
            return red, green, blue
        return None

    def number(self, node) -> int:
        text = self.text(node)
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            self.fail(node, f"{text[:100]!r} is no class number")
        return int(text)

    def text(self, node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, "a name or a number expected")
        return node.value.strip()

    def fail(self, node, why):
        raise BLPSegError(f"{self.path}: line {node.start_mark.line + 1}: {why}; {_FORM}")
