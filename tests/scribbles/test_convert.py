"""Stroke files to labels: every format against files made here, and what happens with bad ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from blpseg.scribbles import CONTEXT_NAMES, VOC_NAMES, convert_annotations, formats
from blpseg.scribbles.rasterize import rasterize_strokes
from blpseg.utils.errors import BLPSegError
from blpseg.utils.made import classes_of
from research.benchmark.literal import convert_plainly, write_stroke_files

from .test_rasterize import plain_loop

ROOT = Path(__file__).resolve().parents[2]


def stroke_xml(polygons, size=(40, 30), head="", depth="<depth>3</depth>"):
    body = "".join(
        f"<polygon><tag>{tag}</tag>" + "".join(f"<point><X>{x}</X><Y>{y}</Y></point>" for x, y in points) + "</polygon>"
        for tag, points in polygons
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height>{depth}</size>"
    return f"{head}<annotation><filename>a.jpg</filename>{size}{body}</annotation>"


def convert(tmp_path, format, source, vocabulary="voc", **options):
    report = convert_annotations(format, str(source), str(tmp_path / "out"), vocabulary, workers=1, progress=False)
    return report, {p.name: cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in sorted((tmp_path / "out").glob("*"))}


def convert_one(tmp_path, format, name, content, vocabulary="voc"):
    source = tmp_path / "in" / name
    source.parent.mkdir(exist_ok=True)
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    report, labels = convert(tmp_path, format, source, vocabulary)
    assert not report.failed, report.failed
    return labels


def refusal(tmp_path, format, name, content, vocabulary="voc"):
    """The reason for which a file is refused, while the good one beside it is done."""
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    report, labels = convert(tmp_path, format, folder, vocabulary)
    assert len(report.failed) == 1 and report.written == 0 and not labels
    line = report.failed[0]
    assert str(folder / name) in line and "\n" not in line and "unexpected" not in line
    return line


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("background: 0\nroad: 1\nroad marking: 1\ncar: {id: 7, color: '#ff0000'}\n")
    return str(path)


# PASCAL-Scribble XML


def test_xml_equals_the_plain_loop(tmp_path):
    write_stroke_files(str(tmp_path / "xml"), 12, seed=3)
    convert_plainly(str(tmp_path / "xml"), str(tmp_path / "plain"))
    report = convert_annotations("xml", str(tmp_path / "xml"), str(tmp_path / "fast"), "voc", workers=2)
    assert report.written == 12 and not report.failed
    for path in (tmp_path / "plain").iterdir():
        made = Image.open(tmp_path / "fast" / path.name)
        assert made.mode == "L"
        assert np.array_equal(np.asarray(made), np.asarray(Image.open(path)))


def test_xml_order_clipping_and_single_points(tmp_path):
    polygons = [
        ("person", [(2, 3), (30, 3)]),
        ("cat", [(10, 0), (10, 9)]),  # over the first
        ("dog", [(-5, 100), (1000, 100)]),  # along the last row
        ("sofa", [(20, 20)]),
        ("train", []),
    ]
    labels = convert_one(tmp_path, "xml", "a.xml", stroke_xml(polygons))
    ids = {name: number for number, name in enumerate(VOC_NAMES)}
    strokes = [(ids[tag], [(y, x) for x, y in points]) for tag, points in polygons if points]
    assert np.array_equal(labels["a.png"], plain_loop(strokes, 30, 40))
    assert labels["a.png"][3, 10] == ids["cat"] and labels["a.png"][20, 20] == ids["sofa"]


@pytest.mark.parametrize("name, count", [("voc", 21), ("context", 60)])
def test_builtin_vocabularies(tmp_path, name, count):
    names = VOC_NAMES if name == "voc" else CONTEXT_NAMES
    assert len(names) == count == len(set(names))
    assert (names[0], names[1], names[20]) == ("background", "plane", "monitor")
    if name == "context":
        assert (names[21], names[40], names[59]) == ("bag", "mountain", "wood")
    polygons = [(tag, [(i % 40, i // 40)]) for i, tag in enumerate(names)]
    label = convert_one(tmp_path, "xml", "a.xml", stroke_xml(polygons), name)["a.png"]
    assert label.reshape(-1)[:count].tolist() == list(range(count)) and (label.reshape(-1)[count:] == 255).all()


@pytest.mark.parametrize(
    "variant",
    [
        lambda x: x.encode("utf-16"),
        lambda x: b'<?xml version="1.0" encoding="ISO-8859-1"?>' + x.replace("a.jpg", "\xe9.jpg").encode("latin-1"),
        lambda x: b"\xef\xbb\xbf" + x.encode(),
        lambda x: x.replace("<polygon>", "<!-- <polygon><tag>dog</tag> --><polygon>").encode(),
        lambda x: x.replace("<tag>cat</tag>", "<tag> <![CDATA[cat]]> </tag>").encode(),
        lambda x: x.replace("<X>10</X>", "<X>1&#48;</X>").encode(),
        lambda x: x.replace("<X>10</X>", "<X>10.9</X>").replace("<X>-5</X>", "<X>-1e30</X>").encode(),
        lambda x: x.replace("<X>1000</X>", f"<X>{'9' * 30}</X>").encode(),
        lambda x: x.replace("<point>", '<point a="1"><Z/>').encode(),
        lambda x: x.replace("<polygon>", "<polygon><name>1</name>").encode(),
        lambda x: b"<!DOCTYPE annotation>" + x.encode(),
        lambda x: x.replace("<size>", "<size><width>40</width><height>30</height></size><size>").encode(),
    ],
)
def test_well_formed_variants_read_the_same(tmp_path, variant):
    plain = stroke_xml([("person", [(2, 3), (30, 20)]), ("cat", [(10, 0), (-5, 9), (1000, 12)])])
    expected = plain_loop([(15, [(3, 2), (20, 30)]), (8, [(0, 10), (9, -5), (12, 1000)])], 30, 40)
    assert np.array_equal(convert_one(tmp_path, "xml", "a.xml", plain)["a.png"], expected)
    assert np.array_equal(convert_one(tmp_path, "xml", "b.xml", variant(plain))["b.png"], expected)


def test_both_readers_of_xml_agree(tmp_path):
    write_stroke_files(str(tmp_path), 5, seed=1)
    for path in map(str, tmp_path.iterdir()):
        data = Path(path).read_bytes()
        fast, general = formats._pascal_as_published(path, data), formats._pascal_as_xml(path, data)
        assert fast[:2] == general[:2] and [name for name, _ in fast[2]] == [name for name, _ in general[2]]
        for (_, first), (_, second) in zip(fast[2], general[2], strict=True):
            assert np.array_equal(np.clip(first, 0, (374, 499)), second)


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
GOOD = [("person", [(1, 2), (3, 4)])]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b"\0\0\0\0", "well-formed"),
        (b"\x89PNG\r\n\x1a\n", "well-formed"),
        (stroke_xml(GOOD)[:-20], "well-formed"),
        (stroke_xml(GOOD) + "<more/>", "well-formed"),
        (stroke_xml(GOOD, head=BOMB), "entities"),
        (stroke_xml(GOOD, head='<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'), "entities"),
        (stroke_xml(GOOD, head='<!DOCTYPE a [<!ENTITY % x SYSTEM "http://localhost/x">]>'), "entities"),
        (stroke_xml(GOOD, head='<!DOCTYPE a SYSTEM "http://localhost/x">').replace("person", "&x;"), "well-formed"),
        (stroke_xml(GOOD, head='<!DOCTYPE a [<!NOTATION n SYSTEM "n"><!ENTITY x SYSTEM "x" NDATA n>]>'), "entities"),
        (stroke_xml(GOOD, head='<?xml version="1.0" encoding="nonsense"?>'), "well-formed"),
        ("<other/>", "stroke file"),
        ("<annotation/>", "stroke file"),
        (stroke_xml([("unicorn", [(1, 1)])]), "'unicorn'"),
        (stroke_xml([("Person", [(1, 1)])]), "'person'"),
        (stroke_xml([("", [(1, 1)])]), "no <tag>"),
        (stroke_xml(GOOD).replace("<tag>person</tag>", ""), "no <tag>"),
        (stroke_xml(GOOD).replace("<X>1</X>", ""), "missing"),
        (stroke_xml(GOOD).replace("<X>1</X>", "<X/>"), "coordinate"),
        (stroke_xml([("person", [("nan", 1)])]), "not finite"),
        (stroke_xml([("person", [("1e400", 1)])]), "not finite"),
        (stroke_xml([("person", [("-inf", 1)])]), "not finite"),
        (stroke_xml([("person", [("0x10", 1)])]), "no number"),
        (stroke_xml([("person", [("1_0", 1)])]), "no number"),
        (stroke_xml([("person", [("1,5", 1)])]), "no number"),
        (stroke_xml(GOOD, size=(0, 5)), "width"),
        (stroke_xml(GOOD, size=(5, -3)), "height"),
        (stroke_xml(GOOD, size=("nan", 3)), "width"),
        (stroke_xml(GOOD, size=("", 3)), "width"),
        (stroke_xml(GOOD, size=(2.5, 3)), "width"),
        (stroke_xml(GOOD, size=(1000000, 1000000)), "pixels"),
        (stroke_xml(GOOD, size=("9" * 5000, 1)), "width"),
        (stroke_xml(GOOD).replace("<size>", "<size><width>1</width><height>1</height></size><size>"), "disagree"),
    ],
)
def test_hostile_xml_is_refused(tmp_path, content, reason):
    assert reason in refusal(tmp_path, "xml", "bad.xml", content)


def test_deep_nesting_and_many_points(tmp_path):
    deep = "<annotation>" + "<a>" * 20000 + "</a>" * 20000 + "</annotation>"
    assert "stroke file" in refusal(tmp_path, "xml", "bad.xml", deep)
    zigzag = [(x % 2 * 10**9, x % 3) for x in range(3000)]
    labels = convert_one(tmp_path / "in", "xml", "many.xml", stroke_xml([("cat", zigzag)], size=(3000, 3)))
    assert (labels["many.png"] != 255).any()


def test_bad_files_do_not_stop_the_others_and_later_runs_do_what_is_left(tmp_path):
    folder, out = tmp_path / "xml", tmp_path / "out"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.xml").write_text(stroke_xml(GOOD))
    (folder / "bad.xml").write_text("<annotation>")
    (folder / "dir.xml").mkdir()
    (folder / "gone.xml").symlink_to("nowhere")
    (folder / "notes.txt").write_text("no stroke file")
    report = convert_annotations("xml", str(folder), str(out), "voc", workers=2)
    assert (report.written, report.up_to_date, len(report.failed)) == (40, 0, 2)
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{n}.png" for n in range(40))  # no temporary files either

    times = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    (folder / "bad.xml").write_text(stroke_xml(GOOD))
    (folder / "0.xml").write_text(stroke_xml([("cat", [(5, 5)])]))
    (out / "1.png").write_bytes((out / "1.png").read_bytes()[:-5])  # cut short by something else
    (out / "2.png").write_bytes(b"")
    (out / "3.png").unlink()
    report = convert_annotations("xml", str(folder), str(out), "voc", workers=1)
    assert (report.written, report.up_to_date, len(report.failed)) == (5, 36, 1)
    same = {p.name for p in out.iterdir() if times.get(p.name) == p.stat().st_mtime_ns}
    assert same == {f"{n}.png" for n in range(4, 40)}
    assert cv2.imread(str(out / "0.png"), -1)[5, 5] == 8
    assert convert_annotations("xml", str(folder), str(out), "context", workers=1).written == 41  # another vocabulary


def test_unusable_as_a_whole(tmp_path, vocabulary):
    (tmp_path / "empty").mkdir()
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "a.xml").write_text(stroke_xml(GOOD))
    (tmp_path / "file").write_text("")
    for source, out, words, reason in [
        ("missing", "out", "voc", "no such"),
        ("empty", "out", "voc", "no .xml file"),
        ("xml", "file", "voc", "is a file"),
        ("xml", "xml", "voc", "another folder"),
        ("xml", "out", "klingon", "vocabulary"),
    ]:
        with pytest.raises(BLPSegError, match=reason):
            convert_annotations("xml", str(tmp_path / source), str(tmp_path / out), words)


def test_sizes_are_checked_against_the_images(tmp_path):
    for folder in ("in", "images"):
        (tmp_path / folder).mkdir()
    for name, size in (("a", (40, 30)), ("b", (30, 40))):
        (tmp_path / "in" / f"{name}.xml").write_text(stroke_xml(GOOD))
        Image.new("RGB", size).save(tmp_path / "images" / f"{name}.jpg")
    arguments = "xml", str(tmp_path / "in"), str(tmp_path / "out"), "voc"
    report = convert_annotations(*arguments, images=str(tmp_path / "images"), workers=1, progress=False)
    assert report.written == 1 and "40 x 30" in report.failed[0] and "b.jpg" in report.failed[0]


def test_command_line(tmp_path):
    folder = tmp_path / "xml"
    folder.mkdir()
    (folder / "a.xml").write_text(stroke_xml(GOOD))
    (folder / "bomb.xml").write_text(stroke_xml(GOOD, head=BOMB))
    command = [
        sys.executable,
        "datasets/prepare_scribbles.py",
        "--output",
        str(tmp_path / "out"),
        "--vocabulary",
        "voc",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--xml", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "bomb.xml: declares XML entities" in done.stderr and "1 labels written" in done.stdout
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


# labelme


def labelme(shapes, **more):
    document = {"version": "5.0", "imagePath": "a.jpg", "imageHeight": 30, "imageWidth": 40, "shapes": shapes, **more}
    return json.dumps(document)


def shape(kind, points, label="road"):
    return {"label": label, "points": points, "shape_type": kind, "flags": {}, "group_id": None}


def test_labelme(tmp_path, vocabulary):
    shapes = [
        shape("linestrip", [[1.2, 2.9], [30.0, 2.0], [30.5, 25.999]]),
        shape("line", [[0, 0], [39.99, 29.99]], "car"),
        shape("point", [[40.0, 30.0]], "background"),  # the far corner of the canvas
    ]
    labels = convert_one(tmp_path, "labelme", "x.json", labelme(shapes), vocabulary)
    strokes = [(1, [(2, 1), (2, 30), (25, 30)]), (7, [(0, 0), (29, 39)]), (0, [(29, 39)])]
    assert np.array_equal(labels["x.png"], plain_loop(strokes, 30, 40))


def test_labelme_without_size_reads_the_image(tmp_path, vocabulary):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "in" / "a.jpg")
    content = labelme([shape("point", [[3, 4]])], imageHeight=None, imageWidth=None, imagePath="..\\photos\\a.jpg")
    label = convert_one(tmp_path, "labelme", "x.json", content, vocabulary)["x.png"]
    assert label.shape == (30, 40) and label[4, 3] == 1


@pytest.mark.parametrize(
    "content, reason",
    [
        ("[]", "not a labelme file"),
        ("{", "not JSON"),
        ("[" * 100000, "JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (labelme("road"), "not a labelme file"),
        (labelme([3]), "no object"),
        (labelme([shape("polygon", [[1, 1], [2, 2], [3, 1]])]), "polygon"),
        (labelme([shape("line", [[1, 1]])]), "1 points"),
        (labelme([shape("linestrip", [])]), "0 points"),
        (labelme([shape("point", [[1, 1, 1]])]), "[x, y]"),
        (labelme([shape("point", [[None, 1]])]), "missing"),
        (labelme([shape("point", [[float("nan"), 1]])]), "finite"),
        (labelme([shape("point", [[True, 1]])]), "number"),
        (labelme([shape("point", [[{}, 1]])]), "number"),
        (labelme([shape("point", [[1, 1]], None)]), "no label"),
        (labelme([shape("point", [[1, 1]], "tree")]), "'tree'"),
        (labelme([], imageHeight=None), "--images"),
        (labelme([], imageHeight=10**9, imageWidth=10**9), "height"),
        (labelme([], imageHeight=True), "height"),
        (labelme([], imageHeight=None, imageData="AAAA"), "imageData"),
    ],
)
def test_labelme_refusals(tmp_path, vocabulary, content, reason):
    assert reason in refusal(tmp_path, "labelme", "x.json", content, vocabulary)


# CVAT


def cvat(images):
    return f"<?xml version='1.0' encoding='utf-8'?><annotations><version>1.1</version><meta/>{images}</annotations>"


def test_cvat(tmp_path, vocabulary):
    images = """<image id="0" name="sub/a.jpg" width="40" height="30">
      <polyline label="road" source="manual" occluded="0" points="1.50,2.25;30.00,2.00" z_order="1"></polyline>
      <polyline label="car" points="10.00,0.00;10.00,12.00" z_order="0"><attribute name="n">1</attribute></polyline>
      <points label="background" points="5.9,5.9;7.0,20.0" z_order="0"/><tag label="good"/></image>
      <image id="1" name="b.png" width="4" height="3"/>"""
    labels = convert_one(tmp_path, "cvat", "annotations.xml", cvat(images), vocabulary)
    strokes = [(7, [(0, 10), (12, 10)]), (0, [(5, 5)]), (0, [(20, 7)]), (1, [(2, 1), (2, 30)])]  # by z_order
    assert np.array_equal(labels["a.png"], plain_loop(strokes, 30, 40))
    assert labels["b.png"].shape == (3, 4) and (labels["b.png"] == 255).all()


@pytest.mark.parametrize(
    "images, reason",
    [
        ("", "no <image>"),
        ("<track/>", "video"),
        ('<image name="a.jpg" width="4" height="3"><box label="car"/></image>', "box"),
        ('<image name="a.jpg" width="4" height="3"><polyline label="car" points="1,2;3"/></image>', "x,y"),
        ('<image name="a.jpg" width="4" height="3"><polyline label="car"/></image>', "x,y"),
        ('<image name="a.jpg" width="4" height="3"><polyline points="1,2"/></image>', "label"),
        ('<image name="a.jpg" width="4" height="3"><points label="car" points="1,nan"/></image>', "finite"),
        ('<image name="a.jpg" width="4" height="3"><points label="car" points="1,2" z_order="x"/></image>', "z_order"),
        ('<image name="a.jpg" height="3"/>', "width"),
        ('<image width="4" height="3"/>', "file name"),
        ('<image name="../.." width="4" height="3"/>', "file name"),
    ],
)
def test_cvat_refusals(tmp_path, vocabulary, images, reason):
    assert reason in refusal(tmp_path, "cvat", "x.xml", cvat(images), vocabulary)


def test_two_images_of_one_name(tmp_path):
    images = '<image name="a/1.jpg" width="4" height="3"/><image name="b/1.png" width="4" height="3"/>'
    (tmp_path / "x.xml").write_text(cvat(images))
    report, labels = convert(tmp_path, "cvat", tmp_path / "x.xml")
    assert report.written == 1 and "different names" in report.failed[0] and list(labels) == ["1.png"]


# Label Studio


def encode_rle(values, sizes=(3, 4, 8, 16)):
    """The code's description taken literally, as a string of bits; runs repeat, single values are literal."""
    bits = f"{len(values):032b}{8 - 1:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    changes = [0, *(np.flatnonzero(np.diff(values)) + 1), len(values)]
    literal = []

    def flush():
        nonlocal bits
        while literal:
            part, literal[:] = literal[: 1 << sizes[0]], literal[1 << sizes[0] :]
            bits += "0" + "00" + f"{len(part) - 1:0{sizes[0]}b}" + "".join(f"{v:08b}" for v in part)

    for start, stop in zip(changes, changes[1:], strict=False):
        value, left = int(values[start]), stop - start
        if left == 1:
            literal.append(value)
            continue
        flush()
        while left:
            which = next((k for k in range(4) if left <= 1 << sizes[k]), 3)
            count = min(left, 1 << sizes[which])
            bits += "1" + f"{which:02b}" + f"{count - 1:0{sizes[which]}b}" + f"{value:08b}"
            left -= count
    flush()
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def rgba(mask, color=(10, 200, 30)):
    pixels = np.zeros((*mask.shape, 4), int)
    pixels[mask] = (*color, 255)
    return pixels.reshape(-1)


def brush(mask, label, **more):
    value = {"format": "rle", "rle": encode_rle(rgba(mask)), "brushlabels": [label]}
    height, width = mask.shape
    size = {"original_width": width, "original_height": height, "image_rotation": 0}
    return {"type": "brushlabels", "value": value, "to_name": "image", "from_name": "tag", **size, **more}


def task(results, image="/data/upload/3/0a1b2c3d-a%20b.jpg", **more):
    return {"id": 1, "data": {"image": image}, "annotations": [{"id": 2, "result": results, **more}]}


def test_label_studio(tmp_path, vocabulary):
    rng = np.random.default_rng(0)
    first, second = np.zeros((2, 30, 41), bool)
    first[3:9, 2:40] = True
    second[5:20, 10:13] = rng.random((15, 3)) < 0.7
    tasks = [
        task([brush(first, "road"), {"type": "choices", "value": {"choices": ["good"]}}, brush(second, "car")]),
        task([brush(second, "car")], image="/data/local-files/?d=set/b.png"),
        task([brush(first, "car")], image="s3://bucket/c.jpg?x=1", was_cancelled=True),
        {"id": 3, "data": {"image": "d.jpg"}, "annotations": []},
    ]
    labels = convert_one(tmp_path, "label-studio", "export.json", json.dumps(tasks), vocabulary)
    expected = np.full((30, 41), 255, np.uint8)
    expected[first] = 1
    expected[second] = 7
    assert sorted(labels) == ["a b.png", "b.png"]
    assert np.array_equal(labels["a b.png"], expected)
    assert np.array_equal(labels["b.png"] == 7, second)


def test_label_studio_rle_of_any_values():
    from blpseg.scribbles.label_studio_rle import decode_rle

    rng = np.random.default_rng(1)
    for _ in range(30):
        values = np.repeat(rng.integers(0, 256, 60), rng.choice([1, 1, 2, 7, 9, 40, 300, 70000], 60, p=[1 / 8] * 8))
        sizes = rng.choice(np.arange(1, 17), 4)
        assert np.array_equal(decode_rle("x", encode_rle(values, sorted(sizes)), len(values)), values)


def test_label_studio_rle_of_the_reference_encoder():
    # What thi.ng/rle-pack gives for [1, 1, 1, 1, 1, 2, 3, 4] with its default sizes, written out by hand.
    from blpseg.scribbles.label_studio_rle import decode_rle

    bits = f"{8:032b}" + "00111" + "0010" + "0011" + "0111" + "1111"
    bits += "1" + "00" + "100" + "00000001"  # five times 1
    bits += "0" + "00" + "010" + "00000010" + "00000011" + "00000100"  # 2, 3, 4
    rle = [int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8)]
    assert decode_rle("x", rle, 8).tolist() == [1, 1, 1, 1, 1, 2, 3, 4]


MASK = np.eye(6, 8, dtype=bool)


@pytest.mark.parametrize(
    "document, reason",
    [
        ([], "annotation"),
        ([3], "`data`"),
        ([{"image": "a.jpg", "tag": []}], "`data`"),
        ([task([brush(MASK, "road")], image="a text")], "image"),
        ([task([brush(MASK, "tree")])], "'tree'"),
        ([task([brush(MASK, "road", original_width=9)])], "needs"),
        ([task([brush(MASK, "road", original_width=None)])], "width"),
        ([task([brush(MASK, "road", image_rotation=90)])], "rotated"),
        ([task([{**brush(MASK, "road"), "value": {"rle": [1, 2, 3], "brushlabels": ["road"]}}])], "cut short"),
        ([task([{**brush(MASK, "road"), "value": {"rle": ["x"], "brushlabels": ["road"]}}])], "bytes"),
        ([task([{**brush(MASK, "road"), "value": {"rle": [300], "brushlabels": ["road"]}}])], "bytes"),
        ([task([{**brush(MASK, "road"), "value": {"rle": [0], "brushlabels": ["road", "car"]}}])], "label"),
        ([task([{"type": "rectanglelabels", "value": {"x": 1}}])], "rectanglelabels"),
        ([task([None])], "value"),
        ([task([{"type": "choices", "value": {}}])], "no brush stroke"),
    ],
)
def test_label_studio_refusals(tmp_path, vocabulary, document, reason):
    assert reason in refusal(tmp_path, "label-studio", "x.json", json.dumps(document), vocabulary)


def test_label_studio_cut_code(tmp_path, vocabulary):
    result = brush(MASK, "road")
    result["value"]["rle"] = result["value"]["rle"][:-3]
    assert "cut short" in refusal(tmp_path, "label-studio", "x.json", json.dumps([task([result])]), vocabulary)


# Colour PNG


def write_png(path, array, palette=None):
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)


COLORS = """\
background: {id: 0, color: [0, 0, 0]}
car: {id: 7, color: ["#ff0000", "#cc0000"]}
"#00ff00": 9
"0, 0, 255": car
"#ffffff": unannotated
"""


def test_color_png(tmp_path):
    (tmp_path / "colors.yaml").write_text(COLORS)
    colors = [(0, 0, 0), (255, 0, 0), (204, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    index = np.random.default_rng(0).integers(0, 6, (20, 30))
    rgb = np.array(colors, np.uint8)[index]
    transparent = np.dstack([rgb, np.full((20, 30), 255, np.uint8)])
    transparent[:3] = (1, 2, 3, 0)
    write_png(tmp_path / "in" / "rgb.png", rgb)
    write_png(tmp_path / "in" / "rgba.png", transparent)
    write_png(tmp_path / "in" / "palette.png", index.astype(np.uint8), [c for color in colors for c in color])
    report, labels = convert(tmp_path, "color-png", tmp_path / "in", str(tmp_path / "colors.yaml"))
    expected = np.array([0, 7, 7, 9, 7, 255])[index]
    assert not report.failed and len(labels) == 3
    assert np.array_equal(labels["rgb.png"], expected) and np.array_equal(labels["palette.png"], expected)
    expected[:3] = 255
    assert np.array_equal(labels["rgba.png"], expected)


def test_color_png_of_the_voc_palette_and_of_a_list(tmp_path):
    # the VOC palette's well-known beginning, and its colour of 255
    colors = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (224, 224, 192)]
    write_png(tmp_path / "in" / "a.png", np.array([colors], np.uint8))
    _, labels = convert(tmp_path, "color-png", tmp_path / "in", "voc")
    assert labels["a.png"].tolist() == [[0, 1, 2, 3, 4, 255]]
    (tmp_path / "list.yaml").write_text("".join(f"- [{r}, {g}, {b}]\n" for r, g, b in colors))
    _, labels = convert(tmp_path, "color-png", tmp_path / "in", str(tmp_path / "list.yaml"))
    assert labels["a.png"].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_indexed_png_without_colors(tmp_path):
    (tmp_path / "names.txt").write_text("background\nroad\n")
    index = np.array([[0, 1, 255]], np.uint8)
    write_png(tmp_path / "in" / "p.png", index, list(range(200)))
    write_png(tmp_path / "in" / "grey.png", index)
    report, labels = convert(tmp_path, "color-png", tmp_path / "in", str(tmp_path / "names.txt"))
    assert not report.failed
    assert np.array_equal(labels["p.png"], index) and np.array_equal(labels["grey.png"], index)


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.full((4, 5, 3), 77, np.uint8), "20 pixels of 1 colours"),
        (np.full((4, 5), 3, np.uint8), "value 3"),
    ],
)
def test_color_png_refusals(tmp_path, array, reason):
    (tmp_path / "colors.yaml").write_text(COLORS)
    source = tmp_path / "made.png"
    write_png(source, array)
    assert reason in refusal(tmp_path, "color-png", "a.png", source.read_bytes(), str(tmp_path / "colors.yaml"))


def test_damaged_png(tmp_path):
    write_png(tmp_path / "made.png", np.random.default_rng(0).integers(0, 2, (50, 50, 3)).astype(np.uint8))
    data = (tmp_path / "made.png").read_bytes()
    assert "not a PNG" in refusal(tmp_path, "color-png", "a.png", data[: len(data) // 2])


def test_wide_strokes(tmp_path):
    """--width stamps a brush on every pixel of the published rule; width 1 leaves labels up to date."""
    source, out = tmp_path / "a.xml", tmp_path / "out"
    source.write_text(
        "<annotation><size><width>30</width><height>20</height></size><polygon><tag>cat</tag>"
        "<point><X>4</X><Y>5</Y></point><point><X>20</X><Y>12</Y></point></polygon></annotation>"
    )
    thin, wide = (
        convert_annotations("xml", str(source), str(out), "voc", width=width, workers=1, progress=False)
        for width in (1, 5)
    )
    assert thin.written == wide.written == 1
    label = cv2.imread(str(out / "a.png"), -1)
    line = rasterize_strokes([(8, np.array([[5, 4], [12, 20]]))], 20, 30)
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    np.testing.assert_array_equal(label == 8, cv2.dilate((line == 8).astype(np.uint8), brush) > 0)
    assert convert_annotations("xml", str(source), str(out), "voc", width=5, workers=1, progress=False).up_to_date == 1
    assert classes_of(str(out / "a.png"))[8] == "cat"


def test_drawn_labels_are_not_overwritten(tmp_path):
    source, out = tmp_path / "a.xml", tmp_path / "out"
    source.write_text("<annotation><size><width>3</width><height>2</height></size></annotation>")
    out.mkdir()
    cv2.imwrite(str(out / "a.png"), np.full((2, 3), 7, np.uint8))
    drawn = (out / "a.png").read_bytes()
    report = convert_annotations("xml", str(source), str(out), "voc", workers=1, progress=False)
    assert "a.png: not made by this command" in report.failed[0] and (out / "a.png").read_bytes() == drawn
    assert convert_annotations("xml", str(source), str(out), "voc", workers=1, progress=False, force=True).written == 1
    source.write_text("<annotation><size><width>4</width><height>2</height></size></annotation>")
    report = convert_annotations("xml", str(source), str(out), "voc", workers=1, progress=False)
    assert report.written == 1  # it is ours now
