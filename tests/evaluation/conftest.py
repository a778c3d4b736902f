"""A small generated data set in the catalogs."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import blpseg

from .toys import CLASSES, COLORS, IGNORE, make_image, make_mask


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Call it with a number of images: registers ``toy_val`` with them and returns the records."""
    registered = []

    def make(count=4, size=(40, 56), evaluator_type="sem_seg", name="toy_val", volumes=None, scribbles=False):
        root = Path(tmp_path) / name
        root.mkdir()
        records = []
        for i in range(count):
            image, mask = root / f"img{i}.png", root / f"mask{i}.png"
            Image.fromarray(make_image(i, *size)).save(image)
            Image.fromarray(make_mask(i, *size)).save(mask)
            record = {"file_name": str(image), "sem_seg_file_name": str(mask), "image_id": f"img{i}"}
            record |= {"height": size[0], "width": size[1]}
            if volumes:
                record |= {"volume_id": volumes[i][0], "slice_index": volumes[i][1]}
            if scribbles:
                scribble = np.full(size, 255, np.uint8)
                scribble[size[0] // 2, :] = make_mask(i, *size)[size[0] // 2]
                record["scribble_file_name"] = str(root / f"scribble{i}.png")
                Image.fromarray(scribble).save(record["scribble_file_name"])
            records.append(record)
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(
            stuff_classes=CLASSES, stuff_colors=COLORS, ignore_label=IGNORE, evaluator_type=evaluator_type
        )
        registered.append(name)
        return records

    yield make
    for name in registered:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def toy_cfg(tmp_path):
    """A config for the toy data set on the CPU."""
    return blpseg.get_cfg(
        "",
        [
            "MODEL.DEVICE", "cpu",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES", len(CLASSES),
            "DATASETS.TEST", ("toy_val",),
            "DATALOADER.NUM_WORKERS", 0,
            "INPUT.FORMAT", "RGB",
            "OUTPUT_DIR", str(tmp_path / "out"),
        ],
    )  # fmt: skip
