#!/usr/bin/env python
"""Pictures of the data: strokes, thickened, and masks over the images, as annotated or as the loader gives them."""

import argparse
import itertools
import os
import sys

from blpseg.utils.cli import add_debug_flag, parse_with_opts, run_command
from blpseg.utils.errors import BLPSegError

EXAMPLE = """
Where there is no label the image is washed out and grey; padding has a colour of its own. The legend names the classes
that occur. Files are written as DATASET_NAME.png (annotation) or by their place in the run (dataloader).

examples:
  python tools/visualize_data.py --config-file configs/ACDC-Scribble/blpseg_R18.yaml --source annotation \\
      --output-dir output/data
  python tools/visualize_data.py --config-file configs/ACDC-Scribble/blpseg_R18.yaml --source dataloader \\
      --output-dir output/loader --num-images 8
  python tools/visualize_data.py --dataset camvid_val --source annotation --output-dir output/camvid
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="its DATASETS.TRAIN is shown")
    parser.add_argument(
        "--source",
        choices=("annotation", "dataloader"),
        default="annotation",
        help="the files as they are, or what training sees of them (default: annotation)",
    )
    parser.add_argument("--dataset", nargs="+", default=[], metavar="NAME", help="data sets instead of DATASETS.TRAIN")
    parser.add_argument("--output", "--output-dir", required=True, metavar="DIR", help="where the PNG files go")
    parser.add_argument(
        "--limit", "--num-images", type=int, default=40, metavar="N", help="at most (default: 40; 0: all)"
    )
    add_debug_flag(parser)
    arguments = parse_with_opts(parser)

    from tqdm import tqdm

    from blpseg import get_cfg
    from blpseg.utils.files import write_png_atomic

    cfg = get_cfg(arguments.config_file, arguments.opts)
    if arguments.dataset:
        cfg.DATASETS.TRAIN = tuple(arguments.dataset)
    if not cfg.DATASETS.TRAIN:
        raise BLPSegError("nothing to show: give --dataset NAME ..., or --config-file FILE with DATASETS.TRAIN in it")
    if arguments.source == "annotation":
        pictures = _annotations(cfg.DATASETS.TRAIN)
        total = None
    else:
        pictures = _loaded(cfg)
        total = arguments.limit or 40  # the loader never ends
    count = 0
    for name, picture in tqdm(
        itertools.islice(pictures, total or arguments.limit or None), desc="pictures", unit="file", file=sys.stderr
    ):
        write_png_atomic(os.path.join(arguments.output, f"{name}.png"), picture)
        count += 1
    print(f"{arguments.output}: {count} pictures")


def _annotations(names):
    from detectron2.data import MetadataCatalog

    from blpseg.data.datasets import load_records
    from blpseg.utils.files import read_image, read_label_of
    from blpseg.visualization import result_panels

    for name in names:
        metadata = MetadataCatalog.get(name)
        for record in load_records(name, optional=("scribbles", "masks"), sizes=False):
            image = read_image(record["file_name"])
            labels = {}
            for key, part in (("scribble_file_name", "scribble"), ("sem_seg_file_name", "mask")):
                if key in record:
                    labels[part] = read_label_of(record["file_name"], record[key], image.shape[:2])
            stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
            scribble = labels.pop("scribble", None)
            yield f"{name}_{stem}", result_panels(image, metadata, scribble=scribble, over=labels)


def _loaded(cfg):
    import numpy as np
    from detectron2.data import MetadataCatalog

    from blpseg.data.build import build_train_loader
    from blpseg.utils.labels import IGNORED
    from blpseg.visualization import result_panels

    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    samples = itertools.chain.from_iterable(build_train_loader(cfg))
    for position, sample in enumerate(samples):
        image = sample["image"].numpy().round().astype(np.uint8).transpose(1, 2, 0)
        if cfg.INPUT.FORMAT == "BGR":
            image = image[..., ::-1]
        label = sample["scribble"].numpy()
        stem = os.path.splitext(os.path.basename(sample["file_name"]))[0]
        yield (
            f"{position:05d}_{stem}",
            result_panels(np.ascontiguousarray(image), metadata, scribble=label, padding=label == IGNORED),
        )


if __name__ == "__main__":
    run_command(main)
