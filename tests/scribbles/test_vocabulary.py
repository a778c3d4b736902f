import pytest

from blpseg.scribbles import load_vocabulary
from blpseg.utils.errors import BLPSegError


def load(tmp_path, text):
    (tmp_path / "v.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_vocabulary(str(tmp_path / "v.yaml"))


@pytest.mark.parametrize(
    "text, ids",
    [
        ("background: 0\nroad marking: 3\n", {"background": 0, "road marking": 3}),
        ("no: 0\nyes: 1\n12: 2\nnull: 3\n", {"no": 0, "yes": 1, "12": 2, "null": 3}),  # names, whatever YAML thinks
        ("- a\n- b\n", {"a": 0, "b": 1}),
        ("a\nb c\n\n# comment\nd\n", {"a": 0, "b c": 1, "d": 2}),
        ("\ufeffa: 1\nb: 1\n", {"a": 1, "b": 1}),
        ('{"a": {"id": 4}}', {"a": 4}),
        ("one", {"one": 0}),
    ],
)
def test_names(tmp_path, text, ids):
    assert load(tmp_path, text).ids == ids


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no class"),
        ("a: 1\na: 2\n", "line 2: 'a' occurs twice"),
        ("a: 255\n", "0..254"),
        ("a: -1\n", "no class number"),
        ("a: 1.5\n", "no class number"),
        ("a: x\n", "no class number"),
        ("a: [1]\n", "expected"),
        ("a: {color: '#ff0000'}\n", "has `id`"),
        ("a: {id: 1, colour: '#ff0000'}\n", "has `id`"),
        ("a: {id: 1, color: red}\n", "not a colour"),
        ("a: {id: 1, color: [256, 0, 0]}\n", "0..255"),
        ("a: {id: 1, color: '#ff0000'}\nb: {id: 2, color: [255, 0, 0]}\n", "line 2"),
        ("'#ff0000': b\n", "no class number"),
        ("a: [unclosed\n", "not YAML"),
        (b"\xff\xfe\xfa", "not YAML"),
        ("a: &x [*x]\n", "expected"),
        ("--- !!python/name:os.system a: b\n", "mapping"),
        ("x" * (2 << 20), "bytes"),
        ("[" * 1200, "not YAML"),
    ],
)
def test_refusals(tmp_path, text, reason):
    with pytest.raises(BLPSegError, match=reason):
        vocabulary = load(tmp_path, text)
        raise AssertionError(vocabulary)


def test_suggests_a_name():
    with pytest.raises(BLPSegError, match="did you mean 'table'"):
        load_vocabulary("voc").class_id("tabel", "x.xml")


@pytest.mark.parametrize(
    "text", ["classes: [background, leaf]", "DATASETS:\n  FOLDER: {NAME: x, CLASSES: [background, leaf]}"]
)
def test_classes_of_a_project(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert load_vocabulary(str(tmp_path / "config.yaml")).ids == {"background": 0, "leaf": 1}
