#!/usr/bin/env python
"""Compare methods: train and evaluate a grid of data sets, methods and seeds, then a table and figures."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # research/ is not installed

from blpseg.utils.cli import add_debug_flag, count, run_command
from research.study import check_configs, load_study, run_study
from research.summary import summarize

EXAMPLES = """
examples:
  research/run_study.py research/studies/acdc.yaml --jobs 2      into output/studies/acdc; started again, it goes on
  research/run_study.py research/studies/acdc.yaml --jobs 4 --opts MODEL.DEVICE cuda
  research/run_study.py research/studies/acdc.yaml --summary-only --output research/studies/acdc

OUTPUT holds runs.csv (a row for each run: scores, config, git revision, seconds), curves.csv, table.md, scores.png,
curves.png, and runs/ with checkpoints and logs. research/README.md describes the study file.

exit status: 0 all done; 1 a run failed (the others go on); 130 or 143 stopped by Ctrl-C or SIGTERM.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", metavar="STUDY.yaml", help="the grid")
    add("--output", metavar="DIR", help="default: output/studies/NAME of the study file")
    add("--jobs", type=count, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--threads", type=count, default=1, metavar="N", help="CPU threads of a run (default: 1)")
    add("--dry-run", action="store_true", help="list the runs and check their configs")
    add("--summary-only", action="store_true", help="table and figures of what is there; train nothing")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config keys of all runs")
    args = add_debug_flag(parser).parse_args()
    output = args.output or os.path.join("output", "studies", Path(args.study).stem)
    study = load_study(args.study, output, args.opts)
    if args.dry_run:
        check_configs(study)
        print(*study.runs, f"{len(study.runs)} runs into {output}", sep="\n")
        return 0
    status = 0 if args.summary_only else run_study(study, output, jobs=args.jobs, threads=args.threads)
    if status <= 1:
        print(summarize(study, output))
    return status


if __name__ == "__main__":
    run_command(main)
