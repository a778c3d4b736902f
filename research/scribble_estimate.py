#!/usr/bin/env python
"""How far the mIoU estimated from scribbles is from the one of dense masks, on strokes simulated from the masks."""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # research/ is not installed

import blpseg  # noqa: F401  (registers the data sets; before what loads torch, whose own deprecations it silences)

# isort: split
import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate
from tqdm import tqdm

from blpseg import get_cfg
from blpseg.data.build import build_test_loader
from blpseg.evaluation.from_scribbles import ScribbleEvaluator
from blpseg.evaluation.inference import Inference
from blpseg.evaluation.predictor import load_model
from blpseg.evaluation.sem_seg import SemSegEvaluator
from blpseg.scribbles.simulate import simulate_scribble
from blpseg.scribbles.simulate_folder import file_seed
from blpseg.utils.cli import add_debug_flag, count, run_command
from blpseg.utils.files import check_writable, read_label, write_csv
from blpseg.utils.labels import UNANNOTATED


def simulated(name: str, every: int, preference: float, folder: str) -> str:
    """Register every n-th image of a data set with simulated strokes -> the new data set's name."""
    metadata, records = MetadataCatalog.get(name).as_dict(), DatasetCatalog.get(name)[::every]
    ignore = metadata.get("ignore_label", UNANNOTATED)
    for number, record in enumerate(records):
        mask, seed = read_label(record["sem_seg_file_name"]), file_seed(0, record["sem_seg_file_name"])
        label = simulate_scribble(mask, preference=preference, seed=seed, ignore_label=ignore)
        record["scribble_file_name"] = f"{folder}/{number}_{preference}.png"
        cv2.imwrite(record["scribble_file_name"], label)
    metadata["name"] = f"{name}, preference {preference}"
    DatasetCatalog.register(metadata["name"], lambda: records)
    MetadataCatalog.get(metadata["name"]).set(**metadata)
    return metadata["name"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config of the model")
    parser.add_argument("--dataset", metavar="NAME", help="with masks (default: the first of DATASETS.TEST)")
    parser.add_argument("--preference", type=float, nargs="+", default=[0.0, 0.5, 1.0], metavar="P", help="of strokes")
    parser.add_argument("--every", type=count, default=1, metavar="N", help="take every N-th image (default: 1)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as CSV too")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config keys")
    args = add_debug_flag(parser).parse_args()
    if args.output:
        check_writable(args.output)
    cfg = get_cfg(args.config_file, args.opts)
    name, model = args.dataset or cfg.DATASETS.TEST[0], load_model(cfg)
    with TemporaryDirectory() as folder:
        names = [simulated(name, args.every, preference, folder) for preference in args.preference]
        masks = SemSegEvaluator(names[0])
        evaluators = {p: ScribbleEvaluator(each) for p, each in zip(args.preference, names, strict=True)}
        inference = Inference.from_config(cfg, model, classes_only=True, annotated=True)
        masks.reset()
        for inputs in tqdm(build_test_loader(cfg, names[0]), unit=" images"):
            outputs = inference(inputs)
            for evaluator in (masks, *evaluators.values()):
                evaluator.process(inputs, outputs)
    true = masks.evaluate()["sem_seg"]["mIoU"]
    rows = []
    for preference, evaluator in evaluators.items():
        found = evaluator.evaluate()["scribbles"]
        numbers = (found[key] for key in ("mIoU", "mIoU_low", "mIoU_high", "mIoU_annotated_pixels"))
        rows.append([preference, *(round(number, 1) for number in (true, *numbers))])
    columns = ["preference", "mIoU of masks", "estimate", "lowest", "highest", "annotated pixels alone"]
    print(tabulate(rows, columns, floatfmt=".1f", tablefmt="github"))
    if args.output:
        write_csv(args.output, [columns, *rows])


if __name__ == "__main__":
    run_command(main)
