#!/usr/bin/env python3
"""Make a project of your own photos: a config, a class list, and the photos in their places."""

import argparse
import os
from shlex import quote

from blpseg.data.project import create_project
from blpseg.utils.cli import add_debug_flag, run_command

EXAMPLES = """
examples:
  photos to scribble on, with tools/annotate.py or any other program:
    tools/new_project.py leaves --images photos --classes background leaf stem
  with scribbles that exist, and 20 of the photos that have a dense mask kept for validation:
    tools/new_project.py leaves --images photos --scribbles scribbles --masks masks --val 20 \\
        --classes background leaf stem
then:
    tools/annotate.py leaves
    tools/train_net.py --config-file leaves/config.yaml
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("project", metavar="DIR", help="the project's folder, which is made")
    parser.add_argument("--images", required=True, metavar="DIR", help="photos to copy")
    parser.add_argument("--classes", nargs="+", required=True, metavar="NAME", help="class names, background first")
    parser.add_argument("--scribbles", metavar="DIR", help="PNG scribbles with the photos' stems to copy")
    parser.add_argument("--masks", metavar="DIR", help="dense masks with the photos' stems, for validation")
    parser.add_argument(
        "--val", type=int, metavar="N", help="photos kept for validation (default: those that have a mask)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these photos (default: 0)")
    a = add_debug_flag(parser).parse_args()
    count = create_project(a.project, a.classes, a.images, scribbles=a.scribbles, masks=a.masks, val=a.val, seed=a.seed)
    config = os.path.join(a.project, "config.yaml")
    print(f"Wrote {config}: {count} photos to scribble on, {len(a.classes)} classes.")
    print(f"Next: tools/annotate.py {quote(a.project)}, then tools/train_net.py --config-file {quote(config)}")


if __name__ == "__main__":
    run_command(main)
