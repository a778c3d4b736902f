"""Hostile and broken annotation files: each ends in one line that names the file, soon, and writes nothing."""

import contextlib
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blpseg.scribbles import Vocabulary, convert_annotations, load_vocabulary
from blpseg.utils.errors import BLPSegError

from ..conftest import time_limit

WORDS = Vocabulary("words", {"cat": 1}, {(1, 2, 3): 1})
XML = "<annotation><size><width>{w}</width><height>{h}</height></size>{body}</annotation>"
STROKE = "<polygon><tag>cat</tag>{points}</polygon>"
POINT = "<point><X>{x}</X><Y>{y}</Y></point>"


def xml(points, side=20, before=""):
    body = STROKE.format(points="".join(POINT.format(x=x, y=y) for x, y in points))
    return before + XML.format(w=side, h=side, body=body)


def labelme(points, side=20, **more):
    shape = {"label": "cat", "shape_type": "linestrip", "points": points}
    return json.dumps({"imageHeight": side, "imageWidth": side, "shapes": [shape], **more})


def label_studio(rle, side=20):
    value = {"rle": rle, "brushlabels": ["cat"]}
    result = {"type": "brushlabels", "value": value, "original_width": side, "original_height": side}
    return json.dumps([{"data": {"image": "a.jpg"}, "annotations": [{"result": [result]}]}])


def zigzag(count, side):
    return [[(number % 2) * (side - 1), number % side] for number in range(count)]


# Format, content of the file, a word of the line that it must end in; None where the file is fine.
HOSTILE = {
    "spaces before an XML declaration that is none": ("xml", xml([(1, 1), (5, 5)], before=" " * 200_000), None),
    "spaces within a polygon": ("xml", XML.format(w=9, h=9, body=f"<polygon>{' ' * 200_000}<tag></polygon>"), "XML"),
    "polygons that never end": ("xml", XML.format(w=9, h=9, body="<polygon><tag>cat</tag>" * 30_000), "XML"),
    "XML nested deeply": ("xml", "<a>" * 100_000, "XML"),
    "XML entities": ("xml", '<!DOCTYPE a [<!ENTITY b "c">]>' + xml([(1, 1)]), "entities"),
    "XML zigzag": ("xml", xml(zigzag(64_000, 13_000), 13_000), "strokes of"),
    "labelme zigzag": ("labelme", labelme(zigzag(64_000, 13_000), 13_000), "strokes of"),
    "labelme image larger than memory": ("labelme", labelme([[1, 1], [2, 2]], 1 << 20), "pixels"),
    "labelme image data that is an EPS": ("labelme", labelme([[1, 1]], None, imageData="JSFQUy1BZG9iZS0="), "image"),
    "JSON nested deeply": ("labelme", "[" * 100_000, "deeply"),
    "JSON number of many digits": ("labelme", "9" * 100_000, "JSON"),
    "coordinate of many digits": ("labelme", labelme([[1e308, 10**400], [2, 2]]), None),
    "brush larger than the image": ("label-studio", label_studio([255] * 4000), "values where"),
    "brush of many bytes": ("label-studio", label_studio([0, 0, 6, 64, *[0] * (5 << 20)]), "bytes of `rle`"),
    "no text at all": ("cvat", "\0" * 1000, "XML"),
}


def convert(tmp_path, kind, content):
    suffix = {"xml": "xml", "cvat": "xml", "color-png": "png"}.get(kind, "json")
    source = tmp_path / f"a.{suffix}"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    with time_limit():
        return source, convert_annotations(kind, str(source), str(tmp_path / "out"), WORDS, workers=1, progress=False)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_line(tmp_path, name):
    kind, content, word = HOSTILE[name]
    source, report = convert(tmp_path, kind, content)
    if word is None:
        assert report.written == 1, report.failed
        return
    (line,) = report.failed
    assert line.startswith(str(source)) and word in line and "unexpected" not in line, line
    assert not list((tmp_path / "out").iterdir())


VOCABULARIES = {
    "a colour of spaces": "? '1" + " " * 9000 + "x'\n: 1\n",
    "aliases": "a: &a [1, 1]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(50)),
    "nested deeply": "a: " + "[" * 20_000,
    "too large": "a: 1\n" * 100_000,
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_hostile_vocabulary_is_one_line(tmp_path, name):
    path = tmp_path / "v.yaml"
    path.write_text(VOCABULARIES[name])
    with time_limit(), pytest.raises(BLPSegError, match="v.yaml"):
        load_vocabulary(str(path))


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.xml")
    with time_limit(), contextlib.suppress(BLPSegError):
        report = convert_annotations("xml", str(tmp_path), str(tmp_path / "out"), WORDS, workers=1, progress=False)
        assert "not an ordinary file" in report.failed[0]


VALID = {"xml": xml([(1, 1), (5, 5)]), "labelme": labelme([[1, 1], [5, 5]]), "label-studio": label_studio([0] * 9)}
EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 9), st.binary(max_size=6)), max_size=4)


@pytest.mark.parametrize("kind", VALID)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_edited_files_are_labels_or_one_line(tmp_path, kind, edits):
    content = VALID[kind].encode()
    for place, length, new in edits:
        content = content[:place] + new + content[place + length :]
    source, report = convert(tmp_path, kind, content)
    assert report.total == 1
    assert all(line.startswith(str(source)) and "unexpected" not in line for line in report.failed), report.failed


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="abc:[]{}#, -&*!?'\"\n0129f", max_size=60))
def test_any_text_is_a_vocabulary_or_one_line(tmp_path, text):
    path = tmp_path / "v.yaml"
    path.write_text(text)
    with contextlib.suppress(BLPSegError):
        assert load_vocabulary(str(path)).ids or load_vocabulary(str(path)).colors
