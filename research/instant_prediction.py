#!/usr/bin/env python
"""How good and how fast the annotator's instant prediction is, on photographs with dense masks and simulated scribbles.

Prints the mean IoU of each photograph's classes, averaged, and the CPU time from the PUT of the strokes to the
prediction, which is the wait on one quiet core: with the photographs as they are and enlarged to 2,000 x 1,500 pixels.
--sharpen brings the class maps to the photograph's pixels otherwise than the annotator does, for comparison.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # research/ is not installed

import blpseg  # noqa: F401  (registers the data sets; before what loads torch, whose own deprecations it silences)

# isort: split
import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from fastapi.testclient import TestClient
from PIL import Image

from blpseg.annotate import instant
from blpseg.annotate.regions import region_strokes
from blpseg.annotate.server import create_app
from blpseg.annotate.store import Project
from blpseg.data.datasets import load_records
from blpseg.modeling.local_aggregation import local_aggregation
from blpseg.scribbles import simulate_scribble
from blpseg.utils.cli import add_debug_flag, count, run_command
from blpseg.utils.files import read_label_of
from research.simulated_annotator import photo_iou

LARGE = 2000, 1500


def measure(records: list[dict], classes: list[str], ignore: int, size: tuple[int, int] | None, seed: int) -> None:
    """One line: quality and times, photographs resized to ``size`` (width, height) or as they are."""
    scores, first, later = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        masks = {}
        for record in records:
            image = cv2.imread(record["file_name"])
            mask = read_label_of(record["file_name"], record["sem_seg_file_name"], image.shape[:2], ignore)
            if size:
                image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
                mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
            masks[f"{record['image_id']}.png"] = mask
            cv2.imwrite(str(photos / f"{record['image_id']}.png"), image)
        project = Project(Path(folder) / "project", photos, classes)
        with TestClient(create_app(project), base_url="http://127.0.0.1") as client:
            for name, mask in masks.items():
                label = simulate_scribble(mask, preference=0.5, width=3, seed=seed)
                strokes = [s for c in np.setdiff1d(label, 255) for s in region_strokes(label == c, int(c))]
                client.post(f"/api/predict/{name}")  # as the page does when it opens a photograph
                for times, part in ((first, strokes[:1]), (later, strokes)):
                    began = time.process_time()
                    client.put(f"/api/strokes/{name}", json={"strokes": part})
                    answer = client.post(f"/api/predict/{name}")
                    times.append(time.process_time() - began)
                prediction = np.asarray(Image.open(io.BytesIO(answer.content)))
                scores.append(photo_iou(prediction, mask, len(classes)))
    shown = f"{size[0]} x {size[1]}" if size else "as they are"
    print(f"{len(scores)} photographs {shown}: mean IoU {np.mean(scores):.1f} (worst {min(scores):.0f})\n"
          f"    CPU seconds, median and 95th percentile: {np.median(later):.2f}, {np.percentile(later, 95):.2f}; "
          f"first stroke {np.median(first):.2f}, {np.percentile(first, 95):.2f}", flush=True)  # fmt: skip


def bilinear(features: instant.Features, logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Class map (H, W) from logits that are enlarged."""
    size = features.image.shape[1::-1]
    return classes[np.argmax([cv2.resize(x, size) for x in np.float32(logits)], axis=0)].astype(np.uint8)


def lam(features: instant.Features, logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The same after local aggregation by the finest features."""
    finest = torch.from_numpy(features.levels[0][1])[:, : logits.shape[1], : logits.shape[2]]
    finest = torch.nn.functional.normalize(finest, dim=0) * len(finest) ** 0.5  # as large as the embedding's
    aggregated = local_aggregation(torch.tensor(logits)[None].float(), finest[None], 6.0, impl="window")[0]
    return bilinear(features, aggregated.numpy(), classes)


SHARPEN = {"guided filter": instant.guided, "bilinear": bilinear, "LAM": lam}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="voc_2012_scribble_trainaug", help="default: %(default)s")
    parser.add_argument("--limit", type=count, default=24, metavar="N", help="photographs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of choice and scribbles (default: %(default)s)")
    parser.add_argument("--sharpen", choices=SHARPEN, default="guided filter", help="default: %(default)s")
    arguments = add_debug_flag(parser).parse_args()
    instant.guided = SHARPEN[arguments.sharpen]
    records = [record for record in load_records(arguments.dataset) if "sem_seg_file_name" in record]
    chosen = np.random.default_rng(arguments.seed).permutation(len(records))[: arguments.limit]
    records = [records[i] for i in sorted(chosen)]
    metadata = MetadataCatalog.get(arguments.dataset)
    for size in (None, LARGE):
        measure(records, metadata.stuff_classes, metadata.ignore_label, size, arguments.seed)


if __name__ == "__main__":
    run_command(main)
