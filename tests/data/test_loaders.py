"""Batches depend on the seed and the place in the run: not on workers, processes or where a run was resumed."""

import itertools
import pickle

import cv2
import numpy as np
import pytest

from blpseg.data import build
from blpseg.data.build import build_test_loader, build_train_loader
from blpseg.data.datasets import load_records
from blpseg.utils.errors import BLPSegError


def take(loader, count):
    return [
        [(s["image_id"], s["image"].numpy().tobytes(), s["scribble"].numpy().tobytes()) for s in batch]
        for batch in itertools.islice(loader, count)
    ]


def test_workers_do_not_matter(made_cfg):
    # The fourth batch of four crosses into the third epoch of six images.
    expected = take(build_train_loader(made_cfg()), 4)
    for workers in (2, 8):
        assert take(build_train_loader(made_cfg("DATALOADER.NUM_WORKERS", workers)), 4) == expected


def test_a_resumed_run_goes_on_with_the_same_samples(made_cfg):
    expected = take(build_train_loader(made_cfg()), 5)
    for start in (1, 3):
        assert take(build_train_loader(made_cfg(), start_iter=start), 5 - start) == expected[start:]


def test_processes_share_out_each_batch(made_cfg, monkeypatch):
    expected = take(build_train_loader(made_cfg()), 3)
    shares = []
    monkeypatch.setattr(build.comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(build.comm, "get_rank", lambda rank=rank: rank)
        shares.append(take(build_train_loader(made_cfg()), 3))
    assert [a + b for a, b in zip(*shares, strict=True)] == expected
    with pytest.raises(BLPSegError, match="IMS_PER_BATCH 3 is .* must be a multiple of their number, 2"):
        build_train_loader(made_cfg("SOLVER.IMS_PER_BATCH", 3))


def test_every_epoch_is_another_permutation(made_cfg):
    names = [name for batch in take(build_train_loader(made_cfg()), 9) for name, *_ in batch]
    epochs = [names[i : i + 6] for i in range(0, 36, 6)]
    everything = sorted(record["image_id"] for record in load_records("made_train"))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 3


def test_seeds_differ_and_a_negative_one_is_drawn(made_cfg):
    loads = [take(build_train_loader(made_cfg("SEED", seed)), 2) for seed in (5, 6, -1, -1)]
    assert len({pickle.dumps(load) for load in loads}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_arrives_as_one_line(made_cfg, made_folder, workers):
    (made_folder / "scribbles/train/train3.png").write_bytes(b"nonsense")
    loader = build_train_loader(made_cfg("DATALOADER.NUM_WORKERS", workers))
    with pytest.raises(BLPSegError, match=r"^\S*train3\.png: not an image") as caught:
        take(loader, 3)
    assert "\n" not in str(caught.value)


def test_an_unforeseen_failure_names_the_file_too(made_cfg):
    def mapper(record, rng):
        raise ZeroDivisionError("division by zero")

    with pytest.raises(BLPSegError, match=r"^\S*train\d\.jpg: ZeroDivisionError"):
        next(iter(build_train_loader(made_cfg(), mapper=mapper)))


def test_dense_supervision_needs_no_scribbles(made_cfg, made_folder):
    for path in (made_folder / "scribbles/train").iterdir():
        path.unlink()
    assert len(take(build_train_loader(made_cfg("INPUT.SUPERVISION", "dense")), 1)[0]) == 4
    with pytest.raises(BLPSegError, match="scribbles/train: holds no image"):
        build_train_loader(made_cfg())


def test_test_loader_gives_every_image_once_in_order(made_cfg, monkeypatch):
    loader = build_test_loader(made_cfg("DATALOADER.NUM_WORKERS", 2), "made_val")
    assert len(loader) == 3
    batches = list(loader)
    assert [len(batch) for batch in batches] == [1, 1, 1]
    records = load_records("made_val")
    for (sample,), record in zip(batches, records, strict=True):
        assert sample["image_id"] == record["image_id"]
        np.testing.assert_array_equal(sample["image"], cv2.imread(record["file_name"])[..., ::-1].transpose(2, 0, 1))


def test_class_counts_must_agree(made_cfg):
    for call in (build_train_loader, lambda cfg: build_test_loader(cfg, "made_val")):
        with pytest.raises(BLPSegError, match="has 3 classes, MODEL.SEM_SEG_HEAD.NUM_CLASSES is 21"):
            call(made_cfg("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 21))
    with pytest.raises(BLPSegError, match="DATASETS.TRAIN is empty"):
        build_train_loader(made_cfg("DATASETS.TRAIN", ()))
