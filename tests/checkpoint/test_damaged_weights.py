"""Weights files that are damaged or hostile: each is read as it was written, or ends in one line with its name."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blpseg.checkpoint import Checkpointer, load_file, load_weights, save_atomic
from blpseg.checkpoint.conversion import convert
from blpseg.utils.errors import BLPSegError

from ..conftest import time_limit
from .test_checkpoint import Net


def state(iteration=3):
    torch.manual_seed(iteration)
    return {
        "model": Net().state_dict(), "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": []},
        "scaler": {}, "iteration": iteration, "seed": 0, "world_size": 1, "config": "SEED: 0\n",
    }  # fmt: skip


def same(a, b):
    return a.keys() == b.keys() and all(
        same(a[k], b[k])
        if isinstance(a[k], dict)
        else torch.equal(a[k], b[k])
        if torch.is_tensor(a[k])
        else a[k] == b[k]
        for k in a
    )


def saved(writer):
    """The bytes of a small checkpoint: "ours" ends in our digest, "torch" is plain ``torch.save``."""
    if writer == "ours":
        save_atomic("own.pth", state())
        return bytearray(Path("own.pth").read_bytes())
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    return bytearray(buffer.getvalue())


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def message(path="in.pth"):
    with pytest.raises(BLPSegError) as error:
        load_weights(Net(), str(path), complete=True)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and len(text) < 600
    return text


@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_flipped_bit_is_found_or_harmless(writer):
    data = saved(writer)
    central = struct.unpack_from("<I", data, data.rfind(b"PK\5\6") + 16)[0]
    rng = np.random.default_rng(0)
    # Every bit of the first records of the central directory, which torch believes, and some of everything else.
    places = [(at, bit) for at in range(central, central + 60) for bit in range(8)]
    places += [(int(at), int(rng.integers(8))) for at in rng.integers(0, len(data), 150)]
    found = 0
    for at, bit in places:
        data[at] ^= 1 << bit
        Path("in.pth").write_bytes(data)
        data[at] ^= 1 << bit
        try:
            assert same(load_file("in.pth"), state()), (at, bit)
        except BLPSegError as error:
            found += 1
            assert "in.pth" in str(error)
    assert found == len(places) if writer == "ours" else found > len(places) // 3


@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_truncated_file_is_refused(writer):
    data = saved(writer)
    for length in [0, 1, 3, 4, 30, *range(100, len(data), 97), len(data) - 1]:
        Path("in.pth").write_bytes(data[:length])
        message()
    if writer == "ours":
        Path("in.pth").write_bytes(data + b"more")
        message()


def test_resume_takes_the_checkpoint_before_a_damaged_one():
    checkpoints = Checkpointer(".", keep=3)
    for iteration in (1, 3, 5):
        checkpoints.save(state(iteration), iteration)
    newest = Path("model_0000005.pth")
    sound = newest.read_bytes()
    damages = {
        "a bit": sound[:1500] + bytes([sound[1500] ^ 16]) + sound[1501:],
        "half": sound[: len(sound) // 2],
        "another's": Path("model_0000003.pth").read_bytes(),
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "empty": b"",
    }
    for name, data in damages.items():
        newest.write_bytes(data)
        path, found = next(checkpoints.readable())
        assert path.endswith("model_0000003.pth") and same(found, state(3)), name
    for key, value in (("seed", "0"), ("iteration", 4), ("optimizer", []), ("config", None), ("world_size", 0)):
        save_atomic(str(newest), {**state(5), key: value})
        assert next(checkpoints.readable())[0].endswith("model_0000003.pth"), key
    broken = state(5)
    broken["model"]["sem_seg_head.predictor.bias"][0] = float("nan")
    save_atomic(str(newest), broken)
    assert next(checkpoints.readable())[0].endswith("model_0000003.pth")
    newest.unlink()
    os.mkfifo(newest)  # opening it would wait for ever
    assert next(checkpoints.readable())[0].endswith("model_0000003.pth")


def torch_zip(pickled: bytes) -> bytes:
    """A file as torch.save writes it, with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
            archive.infolist()[-1].external_attr = 0
    return buffer.getvalue()


def deep(opcodes: bytes, begin: bytes = b"N", times: int = 50_000) -> bytes:
    return b"\x80\x04" + begin + opcodes * times + b"."


def colliding(count: int) -> bytes:
    return pickle.dumps(dict.fromkeys(range(0, count * (2**61 - 1), 2**61 - 1)), 4)


# Tuple in tuple, each twice: 2^60 nodes to hash as the key of a dict.
DOUBLED = b"\x80\x04}" + b"N" + b"2\x86" * 60 + b"Ns."
BOMBS = {
    "doubled tuple as a key": DOUBLED,
    "doubled tuple in a set": b"\x80\x04\x8f(N" + b"2\x86" * 60 + b"\x90.",
    "doubled tuple in a frozenset": b"\x80\x04(N" + b"2\x86" * 60 + b"\x91.",
    "doubled tuple given to OrderedDict": b"\x80\x02ccollections\nOrderedDict\n]]N" + b"2\x86" * 60 + b"aNaa\x85R.",
    "doubled tuple names a storage": b"\x80\x02N" + b"2\x86" * 60 + b"\x85Q.",
    "deep tuple": deep(b"\x85"),
    "deep list": b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "deep dict": b"\x80\x04" + b"}K\x00" * 50_000 + b"N" + b"s" * 50_000 + b".",
    "deep call": b"\x80\x02ccollections\nOrderedDict\n" + b"\x85R" * 50_000 + b".",
    "colliding integers": colliding(40_000),
    "memo index": b"\x80\x02}r\xff\xff\xff\x7f.",
    "too many operations": b"\x80\x04]" + b"N0" * 260_000 + b".",
    "old class": b"(cos\nsystem\nS'true'\no.",
    "extension": b"\x80\x02\x82\x01.",
    "nothing on the stack": b"\x80\x02.",
    "no mark": b"\x80\x02t.",
}


@pytest.mark.parametrize("form", ["pkl", "zip"])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_built(name, form):
    Path("in.pth").write_bytes(BOMBS[name] if form == "pkl" else torch_zip(BOMBS[name]))
    text = message()
    assert "refused" in text or "not a weights file" in text


def array(value):
    return lambda: Path("in.pth").write_bytes(pickle.dumps({"model": value}, 4))


BIAS = "sem_seg_head.predictor.bias"


def stored(value):
    return lambda: torch.save(value, "in.pth")


def of_net(**other):
    return {**Net().state_dict(), **other}


NOT_WEIGHTS = {
    "a picture": (lambda: Path("in.pth").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "not a weights file"),
    "text": (lambda: Path("in.pth").write_text("MODEL: {}\n"), "not a weights file"),
    "noise": (lambda: Path("in.pth").write_bytes(np.random.default_rng(0).bytes(5000)), "not a weights file"),
    "empty": (lambda: Path("in.pth").write_bytes(b""), "not a weights file"),
    "a folder": (lambda: Path("in.pth").mkdir(), "not a regular file"),
    "a pipe": (lambda: os.mkfifo("in.pth"), "not a regular file"),
    "nothing": (lambda: None, "no such file"),
    "another zip": (lambda: zipfile.ZipFile("in.pth", "w").writestr("a.txt", "a"), "in.pth"),
    "a compressed zip": (
        lambda: zipfile.ZipFile("in.pth", "w", zipfile.ZIP_DEFLATED).writestr("archive/data.pkl", bytes(10**6)),
        "not written by torch.save",
    ),
    "a list": (stored([1]), "expected a mapping"),
    "no tensors": (stored({"model": {"a": "b"}}), "holds no tensors"),
    "a model that is none": (stored({"model": [1]}), "not a mapping of names to weights"),
    "NaN": (stored(of_net(**{BIAS: torch.full((3,), torch.nan)})), f"{BIAS} holds NaN"),
    "infinity": (stored(of_net(**{BIAS: torch.full((3,), torch.inf)})), f"{BIAS} holds NaN"),
    "a number for a weight": (stored(of_net(**{BIAS: torch.tensor(1.0)})), "another shape"),
    "all weights numbers": (stored({k: torch.tensor(1.0) for k in Net().state_dict()}), "another shape"),
    "only numbers in an array file": (array({k: np.zeros(()) for k in Net().state_dict()}), "another shape"),
    "longdouble": (array({"stem.conv1.weight": np.zeros((4, 3, 3, 3), np.longdouble)}), "stem.conv1.weight is of type"),
    "complex": (stored({k: v.to(torch.complex64) for k, v in Net().state_dict().items()}), "holds no tensors"),
    "sparse": (stored({k: v.to_sparse() for k, v in Net().state_dict().items()}), "holds no tensors"),
    "odd names": (array({"": np.zeros(3), "_[mask]_x": np.zeros(3), "fpn.": np.zeros(1)}), "fits this model"),
    "a huge array": (
        lambda: Path("in.pth").write_bytes(
            b"\x80\x02}X\x05\0\0\0modelcnumpy\nndarray\n(\x8a\x06\0\0\0\0\0\x01t\x85RX\1\0\0\0xh\0s."
        ),
        "in.pth",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_is_no_weights_file_is_one_line(name):
    make, expected = NOT_WEIGHTS[name]
    make()
    text = message()
    assert expected in text and "--trust-checkpoint" not in text


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_bytes_are_read_or_refused(data):
    base = data.draw(
        st.sampled_from([pickle.dumps(state()["config"]), BOMBS["doubled tuple as a key"], bytes(torch_zip(b"}."))])
    )
    at = data.draw(st.integers(0, len(base)))
    content = base[:at] + data.draw(st.binary(max_size=40)) + base[at + data.draw(st.integers(0, 5)) :]
    Path("in.pth").write_bytes(content)
    try:
        with time_limit(2):
            load_file("in.pth")
    except BLPSegError as error:
        assert "in.pth" in str(error) and "\n" not in str(error)


def test_others_read_our_checkpoints(tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    save_atomic("own.pth", state())
    assert same(torch.load("own.pth", weights_only=True), state())
    assert same(torch.load("own.pth", weights_only=True, mmap=True), state())
    net = Net()
    DetectionCheckpointer(net).load("own.pth")
    assert same(net.state_dict(), state()["model"])


def test_older_formats_are_read():
    torch.save(state(), "old.pth", _use_new_zipfile_serialization=False)
    assert same(load_file("old.pth"), state())
    pairs = b"\x80\x02ccollections\nOrderedDict\n](](X\1\0\0\0aK\1e](X\1\0\0\0bK\2ee\x85R."  # as Python 2 wrote it
    Path("pairs.pkl").write_bytes(pairs)
    assert load_file("pairs.pkl") == {"a": 1, "b": 2}


def far_block():
    return {"seg_head.4.weight": torch.ones(3, 1), "backbone.conv1.0.weight": torch.ones(1)} | {
        f"backbone.layer1.{i}.conv1.weight": torch.ones(1) for i in (0, 10**12)
    }


@pytest.mark.parametrize(
    "state",
    [
        {"seg_head.4.weight": torch.tensor(1.0), "backbone.conv1.0.weight": torch.ones(1)},
        {"conv1.weight": torch.ones(1), "layer4.0.conv1.weight": torch.ones(1)},
        {"sem_seg_head.predictor.4.weight": torch.ones(1), "backbone.stem.conv1.weight": torch.ones(1)},
        far_block(),
    ],
)
def test_odd_weights_are_not_converted(state):
    with pytest.raises(BLPSegError, match="in.pth"):
        convert(state, "in.pth")
