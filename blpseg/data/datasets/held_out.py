"""Images of a training set that are kept from training, to measure on their strokes."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from ...utils.errors import BLPSegError
from .splits import load_records

if TYPE_CHECKING:
    from detectron2.config import CfgNode

SUFFIX = "_held_out"
_NAMES = ("subject", "volume_id", "image_id", "file_name")  # the first that a record has decides


def split_records(records: list[dict], share: float) -> tuple[list[dict], list[dict]]:
    """Divide records into those to train on and those held out.

    The name of an image decides, or of its volume or subject where it is a slice: images that are added later move no
    other one, so a model never trained on what it is measured on.

    Args:
        records: as :func:`load_records` returns them, or of Detectron2's standard form.
        share: about this part of the images is held out, 0 up to 1.
    """
    parts: tuple[list[dict], list[dict]] = ([], [])
    for record in records:
        name = str(next(record[key] for key in _NAMES if key in record))
        parts[zlib.crc32(name.encode()) < share * 2**32].append(record)
    return parts


def register_held_out(cfg: CfgNode) -> None:
    """Enter ``<NAME>_held_out`` into the catalogs for each NAME of ``DATASETS.TRAIN``; nothing with HOLD_OUT 0."""
    share = cfg.DATASETS.HOLD_OUT
    if not share:
        return
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name in cfg.DATASETS.TRAIN:
        held_out = name + SUFFIX
        DatasetCatalog.pop(held_out, None)
        MetadataCatalog.pop(held_out, None)
        DatasetCatalog.register(held_out, lambda name=name: _held_out(name, share))
        metadata = MetadataCatalog.get(name).as_dict()
        del metadata["name"]
        MetadataCatalog.get(held_out).set(**metadata)


def _held_out(name: str, share: float) -> list[dict]:
    records = split_records(load_records(name), share)[1]
    if not records:
        raise BLPSegError(
            f"data set {name}: DATASETS.HOLD_OUT {share} holds out none of its images; hold out more, or name a data "
            "set in DATASETS.TEST"
        )
    return records


def test_sets(cfg: CfgNode) -> tuple[str, ...]:
    """``DATASETS.TEST``; where that is empty the held-out images of ``DATASETS.TRAIN``, if there are any."""
    if cfg.DATASETS.TEST or not cfg.DATASETS.HOLD_OUT:
        return tuple(cfg.DATASETS.TEST)
    return tuple(name + SUFFIX for name in cfg.DATASETS.TRAIN)
