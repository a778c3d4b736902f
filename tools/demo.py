#!/usr/bin/env python3
"""Segment images, a video or a camera with a trained model and write overlays with a legend."""

import argparse

from blpseg.utils.cli import add_debug_flag, count, parse_with_opts, run_command
from blpseg.utils.errors import BLPSegError

EXAMPLES = """
examples:
  on the checkpoint that `make demo` leaves, which knows its config and the names of its classes:
    tools/demo.py --weights output/demo/model/model_final.pth --output output/pictures --panels \\
        --input 'datasets/synthetic/images/val/*.png'
  a video, with a PNG of class numbers of every frame:
    tools/demo.py --config-file C --weights model.pth --video-input street.mp4 --output output/street --raw

TEST.AUG.ENABLED of the config decides whether an image is seen at several scales; --opts TEST.AUG.ENABLED False is
several times faster. exit status: 0 done; 1 if any input failed (one line each; the others go on).
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="checkpoint; one that the Trainer wrote needs no --config-file"
    )
    parser.add_argument("--config-file", metavar="FILE", help="YAML config of the trained model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="image files, folders of them, or quoted patterns")
    source.add_argument("--dataset", nargs="+", metavar="NAME", help="images of data sets; panels show their labels")
    source.add_argument("--video-input", metavar="FILE", help="a video file")
    source.add_argument(
        "--webcam", nargs="?", type=int, const=0, metavar="N", help="camera N (default 0); q or Ctrl-C ends it"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N images of --input or each data set")
    parser.add_argument("--raw", action="store_true", help="also write class numbers as grey PNG (NAME_raw...)")
    parser.add_argument(
        "--palette", action="store_true", help="store the class colours in these; OpenCV then reads colours"
    )
    parser.add_argument("--plain", action="store_true", help="overlays of the image's size, without legend")
    parser.add_argument(
        "--panels",
        action="store_true",
        help="also write image, annotation probability and prediction side by side (NAME_panels.png; images only)",
    )
    args = parse_with_opts(add_debug_flag(parser))
    if not (args.weights or args.config_file):
        parser.error("give --weights, --config-file or both")
    return args


def main() -> int:
    args = parse_arguments()
    images_wanted = bool(args.input or args.dataset)
    if not images_wanted and (args.panels or args.limit is not None):
        raise BLPSegError("--panels and --limit are for images; leave them out for a video or a camera")

    from blpseg import get_cfg
    from blpseg.evaluation.demo import Demo, dataset_images, find_images
    from blpseg.evaluation.predictor import checkpoint_config

    names: list[str] = []
    if args.config_file:
        weights = ["MODEL.WEIGHTS", args.weights] if args.weights else []
        cfg = get_cfg(args.config_file, [*args.opts, *weights])
    else:
        cfg, names = checkpoint_config(args.weights, args.opts)
    images = [{"file_name": file} for file in find_images(args.input or [])[: args.limit]]
    for name in args.dataset or []:
        images += dataset_images(name)[: args.limit]
    demo = Demo(
        cfg, args.output, class_names=names, raw=args.raw, palette=args.palette, plain=args.plain, panels=args.panels
    )
    if images_wanted:
        failed = demo.run_images(images)
        print(f"{len(images) - failed} of {len(images)} images written to {args.output}")
        return 1 if failed else 0
    if args.video_input:
        print(f"written: {demo.run_video(args.video_input)}")
    else:
        print(f"written: {demo.run_video(args.webcam, preview=_show)}")
    return 0


def _show(frame) -> bool:
    """Show a frame where there is a screen; True when q was pressed."""
    import cv2

    try:
        cv2.imshow("BLPSeg", frame)
        return cv2.waitKey(1) & 0xFF == ord("q")
    except cv2.error:  # an OpenCV without windows, or no screen
        return False


if __name__ == "__main__":
    run_command(main)
