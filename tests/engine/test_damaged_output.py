"""Files of an output directory that are damaged, or links: one line each, and nothing else is touched."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from blpseg import get_cfg
from blpseg.checkpoint import Checkpointer, save_atomic
from blpseg.engine.checkpoint_and_evaluate import CheckpointAndEvaluate
from blpseg.engine.nan_dump import replay
from blpseg.engine.output_dir import claim_output_dir, release_output_dir, start_records
from blpseg.utils.errors import BLPSegError

CONFIGS = [
    b"\xff\xfe\x00",
    b"MODEL: [",
    b"- 1",
    b"3",
    b"a: &a [*a]",
    b"a: " + b"[" * 3000,
    b"!!python/name:os.system ''",
]
EVALUATIONS = [
    *("", "{", "3", '{"a": 1}', "[1]", "[{}]", '[{"iteration": "1", "mIoU": 1}]', '[{"iteration": 0, "mIoU": "high"}]'),
    *('[{"iteration": null, "mIoU": 1}]', '[{"iteration": 0}]', "[" * 100_000),
]


def claim(folder):
    return claim_output_dir(get_cfg("", ["OUTPUT_DIR", str(folder)]))


@pytest.mark.parametrize("content", CONFIGS)
def test_a_damaged_config_beside_checkpoints(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "model_0000001.pth").write_bytes(b"")
    with pytest.raises(BLPSegError, match="config.yaml: .*; restore it, .*--overwrite") as error:
        claim(tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / "config.yaml").read_bytes() == content


@pytest.mark.parametrize(
    "name", [".lock", "config.yaml", "evaluations.json", "last_checkpoint", "log.txt", "metrics.json"]
)
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_link_or_pipe_is_not_written_to(tmp_path, name, kind):
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    {
        "link": lambda path: [elsewhere.write_text("mine"), path.symlink_to(elsewhere)],
        "dangling": lambda path: path.symlink_to(elsewhere), "pipe": os.mkfifo, "folder": os.mkdir,
    }[kind](folder / name)  # fmt: skip
    with pytest.raises(BLPSegError, match=f"{name}: a symbolic link, a folder or a pipe"):
        claim(folder)
    assert elsewhere.read_text() == "mine" if kind == "link" else not elsewhere.exists()


def test_a_sound_folder_is_claimed(tmp_path):
    assert claim(tmp_path)
    release_output_dir(str(tmp_path))


def test_damaged_lines_of_metrics_are_dropped(tmp_path):
    sound = [json.dumps({"iteration": i, "loss": 1.0}) + "\n" for i in range(3)]
    bad = ['{"iteration": "x"}', '{"iteration": null}', "[1]", "{", "[" * 50_000, '{"iteration": NaN}', "\0"]
    (tmp_path / "metrics.json").write_bytes("".join([*sound, *(line + "\n" for line in bad)]).encode() + b"\xff\xfe")
    start_records(str(tmp_path), "SEED: 0\n", 2)
    assert (tmp_path / "metrics.json").read_text() == "".join(sound[:2])


@pytest.mark.parametrize("content", EVALUATIONS)
def test_damaged_evaluations_are_one_line(tmp_path, content):
    (tmp_path / "evaluations.json").write_text(content)
    hook = CheckpointAndEvaluate(Checkpointer(str(tmp_path), 1), dict, lambda: None)
    hook.trainer = SimpleNamespace(start_iter=2)
    with pytest.raises(BLPSegError, match="evaluations.json: not the list of evaluations"):
        hook.before_train()


@pytest.mark.parametrize(
    "change",
    [
        {"config": "MODEL: ["},
        {"config": "- 1"},
        {"config": 3},
        {"config": "MODEL: {DEVICE: 3}"},
        {"model": {}},
        {"model": 3},
    ],
)
def test_a_damaged_dump_is_one_line(tmp_path, change, root):
    cfg = get_cfg(str(root / "configs/Synthetic-Scribble/blpseg_tiny.yaml"))
    dump = {"batch": [], "model": {"a": torch.ones(1)}, "config": cfg.dump(), "iteration": 0, "seed": 0, "rank": 0}
    path = str(tmp_path / "dump.pth")
    save_atomic(path, dump | change)
    with pytest.raises(BLPSegError, match="dump.pth: "):
        replay(path, "cpu")


def test_training_without_a_config_is_one_line(run_tool, tmp_path, capfd):
    assert run_tool("tools/train_net.py", "OUTPUT_DIR", str(tmp_path / "out")) == 1
    assert "DATASETS.TRAIN is empty; give a recipe with --config-file" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
