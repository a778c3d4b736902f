#!/usr/bin/env python3
"""Scribble on photos in the browser, with a model in the loop."""

import argparse
import os
import secrets
import webbrowser

from blpseg.utils.cli import add_debug_flag, run_command

EXAMPLES = """
PROJECT is a folder data set: tools/train_net.py --config-file PROJECT/config.yaml trains on it at any moment.

examples:
  photos of a folder, three classes; the next time PROJECT alone is enough:
    tools/annotate.py my_project --images photos --classes background leaf stem --open
  go on:
    tools/annotate.py my_project
  a class more, after the ones that are there:
    tools/annotate.py my_project --classes background leaf stem flower
  from a tablet in the same network (the URL with its token is printed):
    tools/annotate.py my_project --host 0.0.0.0 --token

docs/ANNOTATE.md shows how to scribble.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("project", metavar="PROJECT", help="the project's folder, made on the first start")
    parser.add_argument("--images", metavar="DIR", help="photos to copy into the project")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="class names, background first")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--token",
        nargs="?",
        const="",
        metavar="TEXT",
        help="secret in the page's URL (default: a random one)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    arguments = add_debug_flag(parser).parse_args()

    # NumPy's many threads for small matrices only slow the rest down; a trainer started later decides for itself.
    limited = "OMP_NUM_THREADS" not in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from blpseg.annotate.server import serve
    from blpseg.annotate.store import Project

    if limited:
        del os.environ["OMP_NUM_THREADS"]

    project = Project(arguments.project, arguments.images, arguments.classes)
    token = "" if arguments.token is None else arguments.token or secrets.token_urlsafe(16)

    def started(url: str) -> None:
        print(f"{len(project.photos)} photos, {len(project.classes)} classes: {url} (Ctrl-C ends)", flush=True)
        if arguments.open:
            webbrowser.open(url)

    serve(project, host=arguments.host, port=arguments.port, token=token, on_start=started)


if __name__ == "__main__":
    run_command(main)
