"""Configs that are wrong, damaged or hostile end in one line; keys that nothing reads are reported."""

import re
from pathlib import Path

import detectron2
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import build_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blpseg import add_blpseg_config, get_cfg
from blpseg.config import flatten, load_config
from blpseg.utils.config_rules import CHOICES, RULES, UNREAD, UNREAD_BY_PART
from blpseg.utils.errors import BLPSegError
from blpseg.utils.yaml_files import parse_yaml

from .conftest import ROOT, time_limit

BLPSEG = "MODEL.META_ARCHITECTURE", "BLPSeg"


def refused(*opts, file=""):
    with pytest.raises(BLPSegError) as error:
        get_cfg(str(file), [*BLPSEG, *opts])
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


# key, a value that is not allowed, a word of what is.
VALUES = [
    ("MODEL.META_ARCHITECTURE", "BLPSegg", "BLPSeg"),
    ("MODEL.BACKBONE.NAME", "resnet", "build_resnet_backbone"),
    ("MODEL.SEM_SEG_HEAD.NAME", "DeepLab", "BLPSegHead"),
    ("MODEL.RESNETS.DEPTH", 42, "50, 101"),
    ("MODEL.RESNETS.NORM", "BatchNorm", "FrozenBN"),
    ("MODEL.DEVICE", "gpu", "cuda"),
    ("MODEL.DEVICE", "cuda:x", "cuda:N"),
    ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0, "from 1 to 254"),
    ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 0, "from 1 to 64"),
    ("MODEL.PIXEL_STD", [0.0, 1.0, 1.0], "above 0"),
    ("MODEL.PIXEL_STD", [1.0], "a list of 3"),
    ("MODEL.PIXEL_MEAN", [1.0] * 5, "a list of 3"),
    ("MODEL.RESNETS.OUT_FEATURES", [], "1 or more"),
    ("MODEL.SEM_SEG_HEAD.IN_FEATURES", [1, 2], "text"),
    ("MODEL.BLPSEG.DECODER.POOL_SCALES", [1.5], "whole number"),
    ("SEED", 2**70, "to 4294967295"),
    ("OUTPUT_DIR", "a\0b", "NUL"),
    ("INPUT.CROP.SIZE", [1e9, 1e9], "to 65536"),
    ("INPUT.SCALE_RANGE", [1e9, 1e9], "to 16"),
    ("MODEL.SWIN.DEPTHS", [1, 1], "4 values"),
    ("MODEL.SWIN.NUM_HEADS", [1, 2], "4 values"),
    ("MODEL.SWIN.WINDOW_SIZE", 0, "from 1"),
    ("MODEL.SWIN.EMBED_DIM", -12, "from 1"),
    ("MODEL.VIT.NUM_HEADS", 0, "from 1"),
    ("MODEL.VIT.PATCH_SIZE", 0, "from 1"),
    ("MODEL.VIT.WINDOW_BLOCK_INDEXES", ["a"], "whole number"),
    ("MODEL.FPN.OUT_CHANNELS", 0, "from 1"),
    ("SOLVER.STEPS", ("a",), "whole number"),
    ("SOLVER.NUM_DECAYS", 0, "1 or more"),
    ("SOLVER.BASE_LR_END", -1.0, "0 or more"),
    ("MODEL.BLPSEG.LAM.SIGMA", -1.0, "above 0"),
    ("MODEL.BLPSEG.LAM.SIGMA", float("nan"), "finite"),
    ("MODEL.BLPSEG.SELF_TRAINING.THRESHOLD", 90.0, "from 0 to 1"),
    ("SOLVER.LR_SCHEDULER_NAME", "Poly", "WarmupPolyLR"),
    ("SOLVER.OPTIMIZER", "Adam", "AdamW"),
    ("SOLVER.CHECKPOINT_PERIOD", 0, "1 or more"),
    ("SOLVER.BASE_LR", float("inf"), "finite"),
    ("SOLVER.MAX_ITER", "many", "a whole number"),
    ("SOLVER.WEIGHT_DECAY_BIAS", "x", "None"),
    ("SOLVER.BASE_LR", 1, "decimal point"),
    ("SOLVER", "3", "mapping"),
    ("OUTPUT.LOG_PERIOD", 0, "1 or more"),
    ("OUTPUT.KEEP_CHECKPOINTS", 0, "1 or more"),
    ("OUTPUT.KEEP_CHECKPOINTS", -1, "1 or more"),
    ("INPUT.CROP.SIZE", ["a", "b"], "a list of 2"),
    ("INPUT.CROP.SIZE", [384], "a list of 2"),
    ("INPUT.SCALE_RANGE", [2.0, 1.0], "smaller"),
    ("INPUT.SCALE_RANGE", [0.0, 1.0], "from 0.01"),
    ("INPUT.FORMAT", "HSV", "BGR, RGB"),
    ("INPUT.SUPERVISION", "boxes", "dense, scribble"),
    ("INPUT.RANDOM_FLIP", "sideways", "vertical"),
    ("INPUT.ROTATION_DEGREES", -3.0, "0 to 180"),
    ("INPUT.COLOR_JITTER.HUE", 0.7, "0 to 0.5"),
    ("DATALOADER.NUM_WORKERS", -1, "0 to 1024"),
    ("DATASETS.TRAIN", (1,), "text"),
    ("TEST.AUG.SCALES", ["1.0x"], "a list"),
    ("TEST.AUG.SCALES", [], "1 to 64"),
    ("TEST.CRF.NUM_WORKERS", -1, "0 to 1024"),
    ("DATASETS.FOLDER.EVALUATOR", "mIoU", "sem_seg"),
    ("TEST.AUG.ENABLED", None, "such as False"),
    ("CUDNN_BENCHMARK", None, "such as False"),
    ("OUTPUT_DIR", None, "a folder"),
    ("SOLVER.MAX_ITTER", 3, "SOLVER.MAX_ITER"),
    ("SOLVER.MAX_ITER", "(" * 3000, "shorten"),
]


@pytest.mark.parametrize(("key", "value", "word"), VALUES)
def test_a_value_that_is_not_allowed(key, value, word):
    text = refused(key, value)
    assert key in text and word in text


def doubled(first, line):
    """A document in which each line names the one before it twice."""
    letters = "abcdefghijklmnopqrstuvwx"
    return "\n".join([first, *(line.format(a, b) for a, b in zip(letters, letters[1:], strict=False))])


YAMLS = {
    "not YAML": ("MODEL: [unclosed", "YAML"),
    "code": ("MODEL: !!python/object/apply:os.system ['true']", "YAML"),
    "an unknown key": ("MODEL: {BLPSEG: {LAM: {SIGMAA: 3}}}", "MODEL.BLPSEG.LAM.SIGMA"),
    "empty": ("", "empty"),
    "a list": ("- a\n- b\n", "mapping"),
    "a word": ("SOLVER", "mapping"),
    "an integer key": ("SOLVER: {3: 4}", "key SOLVER.3 is a int"),
    "a list as key": ("? [a, b]\n: 1\n", "neither text nor"),
    "a date": ("SOLVER: {MAX_ITER: 2024-01-01}", "SOLVER.MAX_ITER is a date"),
    "no date": ("SOLVER: {MAX_ITER: 2024-13-41}", "YAML"),
    "a huge number": (f"SOLVER: {{MAX_ITER: {'9' * 9000}}}", "c.yaml"),
    "binary": ("OUTPUT_DIR: !!binary aGVsbG8=", "OUTPUT_DIR is a bytes"),
    "another tag": ("OUTPUT_DIR: !mine x", "YAML"),
    "two documents": ("SEED: 0\n---\nSEED: 1\n", "YAML"),
    "zero bytes": ("SEED: 0\x00", "YAML"),
    "aliases": (doubled("a: &a [x]", "{1}: &{1} [*{0}, *{0}]"), "aliases"),
    "merge keys": (doubled("a: &a {x: 1}", "{1}: &{1} {{<<: [*{0}, *{0}]}}"), "aliases"),
    "an alias of itself": ("a: &a [*a]\n", "deep"),
    "deep lists": ("a: " + "[" * 5000, "c.yaml"),
    "deep closed lists": ("a: " + "[" * 90 + "]" * 90, "deep"),
    "deep maps": ("".join(" " * i + "a:\n" for i in range(300)), "deep"),
    "large": ("# " + "x" * 300_000, "more than 262144 characters"),
    "a base that is missing": ("_BASE_: ../Base.yaml", "_BASE_ '../Base.yaml' is missing"),
    "itself as base": ("_BASE_: c.yaml", "circle"),
    "its user as base": ("_BASE_: other.yaml", "circle"),
    "bases of bases": ("_BASE_: [wide.yaml, wide.yaml]", "more than 20 files"),
    "a base that is a number": ("_BASE_: 3", "_BASE_ 3"),
    "a base that is a pipe": ("_BASE_: /dev/stdin", "missing"),
    "a base of the wrong kind": ("_BASE_: list.yaml", "list.yaml: a list"),
    "a value over a mapping": ("_BASE_: value.yaml\nSOLVER: {MAX_ITER: 3}", "SOLVER is a mapping here"),
    "a mapping for a value": ("SEED: {A: 3}", "SEED"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAMLS)
def test_a_file_that_is_no_config(tmp_path, name):
    text, word = YAMLS[name]
    others = {
        "other": "_BASE_: c.yaml",
        "wide": "_BASE_: [a.yaml, a.yaml, a.yaml]",
        "list": "[1]",
        "value": "SOLVER: 3",
    }
    others["a"] = "_BASE_: [b.yaml, b.yaml, b.yaml, b.yaml]"
    others["b"] = "_BASE_: [value.yaml, value.yaml, value.yaml, value.yaml]"
    for other, content in others.items():
        (tmp_path / f"{other}.yaml").write_text(content)
    (tmp_path / "c.yaml").write_text(text)
    message = refused(file=tmp_path / "c.yaml")
    assert word in message and ".yaml" in message


def test_files_that_are_no_text_or_not_there(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00SOLVER")
    assert "YAML" in refused(file=tmp_path / "c.yaml")
    assert "no such config file" in refused(file=tmp_path / "nowhere.yaml")
    assert "no such config file" in refused(file=tmp_path)
    assert "stands alone" in refused("SOLVER.MAX_ITER")


def test_anchors_and_merge_keys_still_work(tmp_path):
    (tmp_path / "c.yaml").write_text("SOLVER: &s {MAX_ITER: 7}\nTEST: {AUG: {SCALES: &l [0.5], <<: {FLIP: False}}}\n")
    cfg = get_cfg(str(tmp_path / "c.yaml"))
    assert cfg.SOLVER.MAX_ITER == 7 and cfg.TEST.AUG.FLIP is False


def test_bases_are_merged_in_their_order(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 1, IMS_PER_BATCH: 1}\n")
    (tmp_path / "b.yaml").write_text("SOLVER: {MAX_ITER: 2}\n")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\nSOLVER: {BASE_LR: 0.5}\n")
    cfg, theirs = get_cfg(str(tmp_path / "c.yaml")), get_detectron2_cfg()
    add_blpseg_config(theirs)
    theirs.merge_from_file(str(tmp_path / "c.yaml"))
    assert cfg == theirs and (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (1, 2, 1)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.text(st.sampled_from("{}[]:,-&*!|>'\"?%@<#~ \n\t0a.e_=x\x00é"), max_size=60))
def test_any_text_is_read_as_pyyaml_does_or_refused(text):
    try:
        expected = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError):
        expected = BLPSegError
    try:
        with time_limit(2):
            assert parse_yaml(text, "in.yaml") == expected or expected != expected
    except BLPSegError as error:
        assert "in.yaml" in str(error) and (expected is BLPSegError or "key" in str(error) or "deep" in str(error))


def test_a_script_adds_keys_and_names_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("MODEL: {MINE: {DEPTH: 4}}\nSOLVER: {LR_SCHEDULER_NAME: Mine}\n")
    with pytest.raises(BLPSegError, match="MODEL.MINE"):
        get_cfg(str(tmp_path / "c.yaml"))
    monkeypatch.setitem(CHOICES, "SOLVER.LR_SCHEDULER_NAME", [*CHOICES["SOLVER.LR_SCHEDULER_NAME"], "Mine"])
    for load in (load_config, lambda cfg, file, _: cfg.merge_from_file(file)):
        cfg = get_detectron2_cfg()
        add_blpseg_config(cfg)
        cfg.MODEL.MINE = CfgNode({"DEPTH": 3})
        load(cfg, str(tmp_path / "c.yaml"), [])
        assert cfg.MODEL.MINE.DEPTH == 4
    load_config(cfg, "", ["MODEL.MINE.DEPTH", 5])
    assert cfg.MODEL.MINE.DEPTH == 5


def test_every_key_of_the_tables_exists():
    keys = flatten(get_cfg())
    assert {*RULES, *CHOICES} <= keys.keys()
    assert all(any(re.fullmatch(pattern, key) for key in keys) for pattern, *_ in (*UNREAD, *UNREAD_BY_PART))


def warnings_of(caplog, *opts):
    caplog.clear()
    get_cfg("", opts)
    return [record.getMessage() for record in caplog.records]


def test_keys_that_nothing_reads_are_reported(caplog):
    size = "INPUT.MIN_SIZE_TRAIN", (512,)
    (line,) = warnings_of(caplog, *BLPSEG, *size)
    assert "INPUT.MIN_SIZE_TRAIN (512,) has no effect" in line and "INPUT.SCALE_RANGE" in line
    assert not warnings_of(caplog, *BLPSEG, "INPUT.MIN_SIZE_TRAIN", (800,), "SOLVER.MAX_ITER", 3)  # the default
    assert not warnings_of(caplog, "MODEL.META_ARCHITECTURE", "SemanticSegmentor", *size)
    aspp = "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 64
    (line,) = warnings_of(caplog, *BLPSEG, "MODEL.SEM_SEG_HEAD.NAME", "BLPSegHead", *aspp)
    assert "MODEL.SEM_SEG_HEAD.NAME BLPSegHead takes no such key" in line
    assert not warnings_of(caplog, *BLPSEG, "MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3PlusHead", *aspp)
    caplog.clear()
    for config in (ROOT / "configs").glob("*/*.yaml"):
        get_cfg(str(config))
    assert not caplog.records


def test_a_written_config_reports_no_key(tmp_path, caplog):
    """YAML has lists where Detectron2's defaults are tuples of tuples."""
    (tmp_path / "written.yaml").write_text(get_cfg("", BLPSEG).dump())
    caplog.clear()
    get_cfg(str(tmp_path / "written.yaml"))
    assert not [r for r in caplog.records if "has no effect" in r.getMessage()]


class Recorder(CfgNode):
    """A config that remembers which keys were read by name."""

    read: set[str] = set()

    def __init__(self, init_dict=None, key_list=None, new_allowed=False):
        super().__init__(init_dict, key_list, new_allowed)
        self.__dict__["path"] = list(key_list or [])

    def __getattr__(self, name):
        if name in self:
            self.read.add(".".join([*self.__dict__.get("path", []), name]))
        return super().__getattr__(name)


def keys_read_by_a_step(config):
    cfg = Recorder(dict(get_cfg(str(config), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])))
    Recorder.read.clear()
    model = build_model(cfg)
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    sample = {
        "image": torch.zeros(3, 48, 64), "scribble": torch.full((48, 64), classes),
        "image_classes": torch.ones(classes, dtype=torch.bool),
    }  # fmt: skip
    sample["scribble"][4:9, 4:50] = 1
    model.train()([sample, sample])
    return set(Recorder.read)


def test_the_table_of_unread_keys_is_true():
    """Not read by a model in training, nor named in BLPSeg's code or in what it calls of Detectron2; and all those."""
    read = keys_read_by_a_step(ROOT / "configs/Synthetic-Scribble/blpseg_tiny.yaml")
    assert {"MODEL.RESNETS.DEPTH", "MODEL.BLPSEG.BLP.GAMMA"} <= read
    folder = Path(detectron2.__file__).parent
    called = ["solver/build.py", "modeling/backbone/resnet.py", "modeling/backbone/fpn.py", "projects/deeplab/loss.py"]
    called += ["modeling/meta_arch/semantic_seg.py", "projects/deeplab/semantic_seg.py", "projects/deeplab/resnet.py"]
    theirs = "\n".join((folder / name).read_text() for name in [*called, "projects/deeplab/build_solver.py"])
    sources = [p for p in (ROOT / "blpseg").rglob("*.py") if p.name not in ("config.py", "config_rules.py")]
    ours = "\n".join(p.read_text() for p in sources)
    by_name = set(re.findall(r"(?=\b(\w+\.\w+)\b)", ours))
    words = set(re.findall(r"\w+", ours + theirs))
    added = flatten(get_cfg()).keys() - flatten(get_detectron2_cfg()).keys()
    for key in flatten(get_cfg()):
        section, _, name = ".".join(key.split(".")[-2:]).rpartition(".")
        if any(re.fullmatch(pattern, key) for pattern, _ in UNREAD):
            found = key in read or f"{section}.{name}" in by_name
            assert not found, f"{key} is read: take it out of UNREAD"
        elif key not in read and key != "VERSION":
            found = name in words or (key in added and section in words)  # its whole section is read
            assert found, f"nothing reads {key}: add it to UNREAD, or remove it"
