#!/usr/bin/env python
"""Measure label preference: the probability that a pixel is annotated, by distance to the boundary and thickness.

Writes label_preference.csv and label_preference.png. A curve that rises is the bias that BLPSeg is about: relative to
its class, the spacious middle is annotated more often than the boundary and thin parts. The dotted line is no bias.
"""

import argparse
import os
from collections.abc import Sequence

import numpy as np

from blpseg.scribbles import preference
from blpseg.utils import files
from blpseg.utils.cli import add_work_flags, count, fraction, parse_with_opts, run_command
from blpseg.utils.errors import BLPSegError

EXAMPLES = """\
examples:
  %(prog)s --dataset acdc_scribble_train --simulate 0 0.5 1 --output label_preference/
  %(prog)s --config-file project/config.yaml --output out/          (DATASETS.TRAIN)
  %(prog)s --dataset camvid_val --simulate 0 1 --output out/        (no scribbles on disk: simulated ones alone)
"""
_ENOUGH = 500  # pixels of a bin, and
_ENOUGH_ANNOTATED = 10  # expected annotations in it, below which a share is noise and not drawn


def write_csv(path: str, counts: np.ndarray, classes: Sequence[str], sets: Sequence[str]) -> None:
    """One row for each set of scribbles, class, quantity and bin that has pixels.

    Args:
        path: where to.
        counts: of :func:`measure`.
        classes: names.
        sets: names of the sets of scribbles.
    """
    probability, relative = preference.shares(counts)
    rows = ["scribbles class quantity from_px to_px pixels annotated probability relative".split()]
    for number, name in enumerate(sets):
        for class_id, class_name in enumerate(classes):
            for kind, quantity in enumerate(preference.QUANTITIES):
                edges = [*preference.bin_edges(quantity).tolist(), ""]
                for index in np.flatnonzero(counts[kind, class_id, :, 0]):
                    at = kind, class_id, index
                    rows.append(
                        [name, class_name, quantity, edges[index], edges[index + 1], counts[at][0]]
                        + [counts[at][1 + number], f"{probability[at][number]:.6g}", f"{relative[at][number]:.4g}"]
                    )
    files.write_csv(path, rows)


def plot(path: str, counts: np.ndarray, classes: Sequence[str], sets: Sequence[str], title: str) -> None:
    """A panel for each class and quantity: probability of being annotated relative to the class's average.

    Bins with too few pixels for a share to mean anything are left out.

    Args:
        path: where to, PNG.
        counts, classes, sets: as for :func:`write_csv`.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    from blpseg.visualization import write_figure

    _, relative = preference.shares(counts)
    shown = [c for c in range(len(classes)) if counts[0, c, :, 0].any()]
    figure = Figure(figsize=(1.5 + 2.6 * len(shown), 6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for kind, quantity in enumerate(preference.QUANTITIES):
        edges = preference.bin_edges(quantity)
        for axis, class_id in zip(axes[kind], shown, strict=True):
            pixels, annotated = counts[kind, class_id, :, :1], counts[kind, class_id, :, 1:]
            expected = pixels * annotated.sum(axis=0) / pixels.sum()
            enough = (pixels >= _ENOUGH) & (expected >= _ENOUGH_ANNOTATED)
            for number, name in enumerate(sets):
                kept = enough[:, number]
                style = {"color": "black", "linewidth": 2.5} if name == "on disk" else {"linewidth": 1.5}
                axis.plot(edges[kept], relative[kind, class_id, kept, number], marker="o", ms=3, label=name, **style)
            axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
            axis.set_xlim(0.9 * edges[0], 1.1 * edges[np.flatnonzero(pixels)[-1]])
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_xlabel("distance to the boundary, px" if kind == 0 else "local thickness, px")
            if kind == 0:
                axis.set_title(classes[class_id])
    for row in axes:
        row[0].set_ylabel("annotated, relative to\nthe class's average")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(title)
    write_figure(path, figure)


def summary(counts: np.ndarray, classes: Sequence[str], sets: Sequence[str]) -> str:
    """A table: how often the outermost and thinnest, and the innermost and thickest, quarter of a class is annotated.

    Each figure is relative to the class as a whole. Quarters are of the class's pixels; a bin that crosses the limit
    counts by its part.
    """
    rows = []
    for number, name in enumerate(sets, 1):
        for class_id, class_name in enumerate(classes):
            if not counts[0, class_id, :, 0].any():
                continue
            row = [name, class_name, f"{counts[0, class_id, :, number].sum() / counts[0, class_id, :, 0].sum():.2%}"]
            for kind in range(len(preference.QUANTITIES)):
                pixels, annotated = counts[kind, class_id, :, 0], counts[kind, class_id, :, number]
                for ends in (slice(None), slice(None, None, -1)):
                    pixel_sum, annotated_sum = (
                        np.append(0, pixels[ends].cumsum()),
                        np.append(0, annotated[ends].cumsum()),
                    )
                    share = np.interp(0.25 * pixel_sum[-1], pixel_sum, annotated_sum) / max(1, annotated_sum[-1])
                    row.append(f"{share / 0.25:.2f}")
            rows.append(row)
    headers = ["scribbles", "class", "annotated", "outermost 1/4", "innermost 1/4", "thinnest 1/4", "thickest 1/4"]
    from tabulate import tabulate

    return tabulate(rows, headers, disable_numparse=True, colalign=["left"] * 2 + ["right"] * 5)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="its DATASETS.TRAIN is measured")
    parser.add_argument("--dataset", default="", metavar="NAME", help="a data set with dense masks, instead")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the CSV and the figure")
    parser.add_argument(
        "--simulate",
        type=fraction,
        nargs="*",
        default=[],
        metavar="PREFERENCE",
        help="also measure scribbles simulated at these preferences, 0..1",
    )
    parser.add_argument("--width", type=count, default=1, help="of simulated strokes, in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of simulated strokes (default: %(default)s)")
    add_work_flags(parser)
    args = parse_with_opts(parser)

    from detectron2.data import MetadataCatalog

    from blpseg import get_cfg
    from blpseg.data.datasets import load_records

    cfg = get_cfg(args.config_file, args.opts)
    name = args.dataset or next(iter(cfg.DATASETS.TRAIN), "")
    if not name:
        raise BLPSegError("nothing to measure: give --dataset NAME, or --config-file FILE with DATASETS.TRAIN in it")
    records = [r for r in load_records(name, optional=("scribbles",)) if "sem_seg_file_name" in r]
    drawn = [r for r in records if "scribble_file_name" in r]
    if not records:
        raise BLPSegError(
            f"{name} has no dense masks to measure by; those of a folder belong into masks/train, with "
            "DATASETS.FOLDER.TRAIN_MASKS masks/train"
        )
    if not drawn and not args.simulate:
        raise BLPSegError(f"{name} has no scribbles beside dense masks; measure simulated ones with --simulate")
    metadata = MetadataCatalog.get(name)
    counts = preference.measure(
        [(r.get("scribble_file_name"), r["sem_seg_file_name"]) for r in drawn or records],
        len(metadata.stuff_classes),
        ignore_label=metadata.ignore_label,
        preferences=args.simulate,
        width=args.width,
        seed=args.seed,
        workers=args.workers,
    )
    sets = ["on disk"] * bool(drawn) + [f"simulated, preference {value:g}" for value in args.simulate]

    table, figure = (os.path.join(args.output, f"label_preference.{kind}") for kind in ("csv", "png"))
    write_csv(table, counts, metadata.stuff_classes, sets)
    plot(figure, counts, metadata.stuff_classes, sets, f"{name}: {len(drawn or records)} images")
    print(summary(counts, metadata.stuff_classes, sets))
    print(f"\nwrote {table} and {figure}")


if __name__ == "__main__":
    run_command(main)
