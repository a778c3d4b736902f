#!/usr/bin/env python
"""Make scribble labels (uint8 PNG, 255 = not annotated) of annotations."""

import argparse

from blpseg.scribbles.convert import convert_annotations, convert_label_images, nnunet_labels
from blpseg.scribbles.formats import FORMATS
from blpseg.utils.cli import add_work_flags, count, run_command

EXAMPLES = """\
examples:
  %(prog)s --xml VOCdevkit/scribble_annotation/pascal_2012 --output VOCdevkit/scribble_annotation/pascal_2012_label \\
      --vocabulary voc
  %(prog)s --labelme annotations/ --output scribbles/ --vocabulary my_classes.yaml
  %(prog)s --cvat annotations.xml --output scribbles/ --vocabulary my_classes.yaml --images images/
  %(prog)s --label-png labels/ --unannotated-value 0 --output scribbles/   # 0 = not annotated, classes from 1
  %(prog)s --nnunet nnUNet_raw/Dataset001_x --output scribbles/

A second run makes only what is new or has changed. A file that cannot be converted is named with the reason; the
others are still done, and the exit status is 1. docs/SCRIBBLES.md describes the vocabulary file and every format.
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    for name, format in FORMATS.items():
        source.add_argument(
            f"--{name}", metavar="PATH", help=f"{format.title}: a folder of *{format.extension} files, or one file"
        )
    source.add_argument(
        "--label-png", metavar="PATH", help="label images with --unannotated-value: a folder, or one file"
    )
    source.add_argument(
        "--nnunet", metavar="DIR", help="raw data set of nnU-Net v2 with an ignore label, labels as PNG"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the labels, made where missing")
    parser.add_argument(
        "--vocabulary",
        metavar="{voc,context,FILE}",
        help="which class number a name or colour stands for: that of PASCAL-Scribble's 21 VOC classes, of its 60 "
        "PASCAL-Context classes, or a YAML file",
    )
    parser.add_argument(
        "--unannotated-value",
        type=int,
        metavar="N",
        help="of --label-png: this value becomes 255, class numbers above it move down by one",
    )
    parser.add_argument(
        "--width",
        type=count,
        default=1,
        metavar="PIXELS",
        help="of a stroke (default: 1, the rule of the published labels); brush masks and colour PNG keep their own",
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images: check that the annotated sizes agree")
    add_work_flags(parser, force="make labels again that are up to date, and replace files that were not made here")
    args = parser.parse_args()
    if (args.label_png is None) != (args.unannotated_value is None):
        parser.error("--label-png and --unannotated-value go together")
    if args.label_png or args.nnunet:
        folder, value = nnunet_labels(args.nnunet) if args.nnunet else (args.label_png, args.unannotated_value)
        report = convert_label_images(folder, args.output, value, workers=args.workers, force=args.force)
        return report.finish("labels", args.output)
    if args.vocabulary is None:
        parser.error("--vocabulary is needed: it says which class number a name stands for")
    format = next(name for name in FORMATS if getattr(args, name.replace("-", "_")) is not None)
    report = convert_annotations(
        format,
        getattr(args, format.replace("-", "_")),
        args.output,
        args.vocabulary,
        images=args.images,
        width=args.width,
        workers=args.workers,
        force=args.force,
    )
    return report.finish("labels", args.output)


if __name__ == "__main__":
    run_command(main)
