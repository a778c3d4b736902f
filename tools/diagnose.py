#!/usr/bin/env python
"""What the parts of the method do in a trained model, seen on training images with scribbles and dense masks.

By distance to the mask's boundary: how many pixels are annotated, how many the annotation head believes to be, and
p, q and the BLP weight of annotated pixels. By class: its share of the true, the annotated and the pseudo-labelled
pixels (as if self-training were on), and how much of it has a pseudo label, and a right one. Of local aggregation: how
its weights spread, how many fall on the position's own class, and the mIoU of the logits before and after it.
"""

import argparse

from blpseg.errors import add_debug_flag, run_command

EXAMPLES = """\
example:
  tools/diagnose.py --config-file output/studies/acdc/runs/ACDC/BLP_+_LAM/seed0/config.yaml --limit 40 \\
      --opts MODEL.WEIGHTS output/studies/acdc/runs/ACDC/BLP_+_LAM/seed0/model_final.pth
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config of the model")
    parser.add_argument("--dataset", metavar="NAME", help="default: the config's DATASETS.TRAIN")
    parser.add_argument("--limit", type=int, default=40, metavar="N", help="images, evenly spaced (default: 40)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config keys")
    args = add_debug_flag(parser).parse_args()
    if args.limit < 1:
        parser.error("--limit is 1 or more")

    from detectron2.data import MetadataCatalog
    from tabulate import tabulate

    from blpseg import get_cfg
    from blpseg.data.datasets import load_records, register_folder
    from blpseg.evaluation.predictor import load_model
    from blpseg.study.diagnosis import run

    cfg = get_cfg(args.config_file, args.opts)
    register_folder(cfg)
    name = args.dataset or cfg.DATASETS.TRAIN[0]
    records = load_records(name)
    records = records[:: max(1, -(-len(records) // args.limit))]
    scale = sum(cfg.INPUT.SCALE_RANGE) / 2
    found = run(load_model(cfg), records, MetadataCatalog.get(name).ignore_label, cfg.INPUT.FORMAT, scale)
    print(f"{name}: {len(records)} images at {scale:g} of their size")
    print(tabulate(found.by_distance(), headers="keys", floatfmt=".3f"))
    print()
    names = MetadataCatalog.get(name).stuff_classes
    rows = [{**row, "class": names[row["class"]]} for row in found.by_class()]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if aggregation := found.of_aggregation():
        print()
        print(tabulate(aggregation.items(), floatfmt=".3f", tablefmt="plain"))


if __name__ == "__main__":
    run_command(main)
