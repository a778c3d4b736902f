#!/usr/bin/env python
"""Check data sets: read every file and report what is wrong. The exit status is then 1."""

import argparse

from blpseg.utils.cli import add_work_flags, fraction, parse_with_opts, run_command
from blpseg.utils.errors import BLPSegError
from blpseg.utils.files import write_json

EXAMPLE = """
Checks that every file opens, sizes agree and label values are in range; measures the share of annotated pixels and the
classes in the images; finds strokes that disagree with the dense mask, images without scribbles, pictures that are in
two splits, and scribbles where 0 seems to mean "not annotated" (it is 255).

examples:
  python tools/check_dataset.py --dataset acdc_scribble_train acdc_val
  python tools/check_dataset.py --config-file configs/ACDC-Scribble/blpseg_R18.yaml --json report.json
  python tools/check_dataset.py --config-file my.yaml DATASETS.FOLDER.ROOT /data/mine
      the splits of DATASETS.TRAIN and DATASETS.TEST, here of a folder data set (docs/DATA.md)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="its DATASETS.TRAIN and .TEST are checked")
    parser.add_argument("--dataset", nargs="+", default=[], metavar="NAME", help="registered data sets to check")
    parser.add_argument("--json", default="", metavar="FILE", help="write the whole report there as well")
    parser.add_argument(
        "--max-disagreement",
        type=fraction,
        default=0.05,
        metavar="SHARE",
        help="of a scribble's pixels that the dense mask may contradict (default: 0.05)",
    )
    add_work_flags(parser)
    arguments = parse_with_opts(parser)

    from blpseg import get_cfg
    from blpseg.data.check import check_datasets

    cfg = get_cfg(arguments.config_file, arguments.opts)  # also registers DATASETS.FOLDER
    names = arguments.dataset or [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not names:
        raise BLPSegError("nothing to check: give --dataset NAME ..., or --config-file FILE with DATASETS in it")
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES if arguments.config_file else None
    reports = check_datasets(
        list(dict.fromkeys(names)),
        num_classes=classes,
        workers=arguments.workers,
        max_disagreement=arguments.max_disagreement,
    )
    print("\n\n".join(report.as_text() for report in reports))
    if arguments.json:
        content = {"healthy": all(r.healthy for r in reports), "datasets": [r.as_dict() for r in reports]}
        write_json(arguments.json, content)
        print(f"\nwrote {arguments.json}")
    return 0 if all(report.healthy for report in reports) else 1


if __name__ == "__main__":
    run_command(main)
