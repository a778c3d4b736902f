#!/usr/bin/env python
"""What the parts of the method do in a trained model, seen on training images with scribbles and dense masks.

By distance to the mask's boundary: how many pixels are annotated, how many the annotation head believes to be, and
p, q and the BLP weight of annotated pixels. By class: its share of the true, the annotated and the pseudo-labelled
pixels (as if self-training were on), and how much of it has a pseudo label, and a right one. Of local aggregation: how
its weights spread, how many fall on the position's own class, and the mIoU of the logits before and after it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # research/ is not installed

from blpseg.utils.cli import add_debug_flag, run_command

EXAMPLES = """\
example:
  research/diagnose.py --config-file output/studies/acdc/runs/ACDC/BLP_+_LAM/seed0/config.yaml --limit 40 \\
      --opts MODEL.WEIGHTS output/studies/acdc/runs/ACDC/BLP_+_LAM/seed0/model_final.pth
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config of the model")
    parser.add_argument("--dataset", metavar="NAME", help="default: the config's DATASETS.TRAIN")
    parser.add_argument("--limit", type=int, default=40, metavar="N", help="images, evenly spaced (default: 40)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON too")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config keys")
    args = add_debug_flag(parser).parse_args()
    if args.limit < 1:
        parser.error("--limit is 1 or more")

    from detectron2.data import MetadataCatalog
    from tabulate import tabulate

    from blpseg import get_cfg
    from blpseg.data.datasets import load_records, register_folder
    from blpseg.evaluation.predictor import load_model
    from blpseg.utils.errors import BLPSegError
    from blpseg.utils.files import check_writable, write_json
    from research.diagnosis import run

    cfg = get_cfg(args.config_file, args.opts)
    register_folder(cfg)
    if not (args.dataset or cfg.DATASETS.TRAIN):
        raise BLPSegError("config: DATASETS.TRAIN is empty; name a data set with --dataset")
    name = args.dataset or cfg.DATASETS.TRAIN[0]
    records = load_records(name)
    records = records[:: max(1, -(-len(records) // args.limit))]
    scale = sum(cfg.INPUT.SCALE_RANGE) / 2
    metadata = MetadataCatalog.get(name)
    model = load_model(cfg)
    if len(metadata.stuff_classes) != model.num_classes:
        raise BLPSegError(
            f"{name} has {len(metadata.stuff_classes)} classes, the model {model.num_classes}; "
            "name the data set with --dataset"
        )
    if args.output:
        check_writable(args.output)
    found = run(model, records, metadata.get("ignore_label", 255), cfg.INPUT.FORMAT, scale)
    by_distance, aggregation = found.by_distance(), found.of_aggregation()
    by_class = [{**row, "class": metadata.stuff_classes[row["class"]]} for row in found.by_class()]
    print(f"{name}: {len(records)} images at {scale:g} of their size")
    print(tabulate(by_distance, headers="keys", floatfmt=".3f"))
    print()
    print(tabulate(by_class, headers="keys", floatfmt=".2f"))
    if aggregation:
        print()
        print(tabulate(aggregation.items(), floatfmt=".3f", tablefmt="plain"))
    if args.output:
        content = {
            "weights": cfg.MODEL.WEIGHTS, "data": name, "images": len(records), "scale": scale,
            "by distance": by_distance, "by class": by_class, "aggregation": aggregation,
        }  # fmt: skip
        write_json(args.output, content)


if __name__ == "__main__":
    run_command(main)
