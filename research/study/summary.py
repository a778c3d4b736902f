"""Tables and figures of a study, from its CSV files alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from blpseg.evaluation.report import write_figure
from blpseg.utils.errors import BLPSegError
from blpseg.utils.files import write_bytes_atomic

from .plan import Study
from .runner import CURVES, ROWS, measured, read_rows, row_key

__all__ = ["mean_and_spread", "paired", "summarize"]

logger = logging.getLogger(__name__)

TABLE = "table.md"
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter NaN for one value, both for none."""
    values = np.asarray(list(values), dtype=float)
    mean = float(values.mean()) if len(values) else float("nan")
    return mean, float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def paired(scores: dict[int, float], reference: dict[int, float]) -> list[float]:
    """Differences to the reference of the seeds that both have."""
    return [scores[seed] - reference[seed] for seed in scores if seed in reference]


def summarize(study: Study, folder: str) -> str:
    """Write ``table.md``, ``scores.png``, ``curves.png`` and, for a study that sweeps, ``sweeps.png``.

    Args:
        study: gives order, reference and upper bound; rows of methods that it does not have are left out.
        folder: holds ``runs.csv`` and ``curves.csv``, and takes the results.

    Returns:
        the table, Markdown.

    Raises:
        BLPSegError: there is no run to sum up, or a file is not a study's.
    """
    path = os.path.join(folder, ROWS)
    scores = _scores(study, read_rows(path), path)
    if not scores:
        raise BLPSegError(f"{path}: no finished run of this study to sum up; run it first")
    text = "\n\n".join(_table(study, scores, data) for data in study.data if _methods(study, scores, data)) + "\n"
    write_bytes_atomic(os.path.join(folder, TABLE), text.encode())
    write_figure(os.path.join(folder, "scores.png"), _draw_scores(study, scores))
    curves = read_rows(os.path.join(folder, CURVES))
    if curves:
        runs = {(data, method, seed) for (data, method, _), seeds in scores.items() for seed in seeds}
        write_figure(os.path.join(folder, "curves.png"), _draw_curves(study, curves, runs))
    if study.sweeps:
        write_figure(os.path.join(folder, "sweeps.png"), _draw_sweeps(study, scores))
    return text


Scores = dict[tuple[str, str, str], dict[int, float]]  # (data, method, metric) -> seed -> value


def _scores(study: Study, rows: list[dict[str, str]], path: str) -> Scores:
    digests = {run.key: run.digest for run in study.runs}
    scores: Scores = {}
    for row in rows:
        key = row_key(row, path)
        if key not in digests:
            continue
        if row.get("digest", digests[key]) != digests[key]:
            logger.warning(
                f"{path}: {' | '.join(map(str, key))} is of another config and left out; run the study again"
            )
            continue
        for metric in measured(study, row):
            try:
                if row.get(metric):
                    scores.setdefault((*key[:2], metric), {})[key[2]] = float(row[metric])
            except ValueError as error:
                raise BLPSegError(f"{path}: {metric} of {' | '.join(map(str, key))} is no number") from error
    return scores


def _methods(study: Study, scores: Scores, data: str) -> list[str]:
    first = next(iter(study.metrics))
    return [m for m in study.methods if (data, m, first) in scores]


def _table(study: Study, scores: Scores, data: str) -> str:
    metrics = list(study.metrics)
    headers = ["method", "seeds", *metrics, *(f"{m} - {study.reference}" for m in metrics)]
    if study.upper_bound:
        headers.append(f"{metrics[0]}, share of {study.upper_bound}")
    headers += study.also
    rows = []
    for method in _methods(study, scores, data):
        values = [scores.get((data, method, metric), {}) for metric in metrics]
        row = [method, len(values[0]), *(_spread(v.values()) for v in values)]
        for metric, v in zip(metrics, values, strict=True):
            others = {} if method == study.reference else scores.get((data, study.reference, metric), {})
            row.append(_difference(paired(v, others)))
        if study.upper_bound:
            bound = scores.get((study.data[data].upper_bound_of, study.upper_bound, metrics[0]), {})
            both = [seed for seed in values[0] if bound.get(seed)]
            row.append(f"{100 * np.mean([values[0][s] / bound[s] for s in both]):.0f} %" if both else "")
        rows.append(row + [_spread(scores.get((data, method, column), {}).values(), ".2f") for column in study.also])
    parts = [f"### {data}", tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)]
    pairs = []
    for pair in study.compare:
        first, second = ([scores.get((data, method, metric), {}) for metric in metrics] for method in pair)
        differences = [paired(a, b) for a, b in zip(first, second, strict=True)]
        if any(differences):
            pairs.append([" - ".join(f"({m})" if " + " in m else m for m in pair), *map(_difference, differences)])
    if pairs:
        parts.append(tabulate(pairs, headers=["difference", *metrics], tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)


def _difference(values: list[float]) -> str:
    higher = sum(d > 0 for d in values)
    return f"{_spread(values, '+.1f')} ({higher}/{len(values)} higher)" if values else ""


def _spread(values: Iterable[float], spec: str = ".1f") -> str:
    mean, deviation = mean_and_spread(values)
    if np.isnan(mean):
        return ""
    return f"{mean:{spec}}" if np.isnan(deviation) else f"{mean:{spec}} ± {deviation:{spec.lstrip('+')}}"


def _colors(methods: Iterable[str]) -> dict[str, str]:
    return {method: _COLORS[i % len(_COLORS)] for i, method in enumerate(methods)}


def _draw_scores(study: Study, scores: Scores) -> Figure:
    """A dot a seed, a bar at the mean; a row of panels a metric, a column a data set."""
    data = [d for d in study.data if _methods(study, scores, d)]
    swept = {method for sweep in study.sweeps for _, method in sweep.points}
    methods = [m for m in study.methods if not (m in swept and ", " in m)] or list(study.methods)
    colors = _colors(methods)
    height = 0.28 * len(methods) + 0.9
    figure = Figure(figsize=(2.2 + 2.7 * len(data), height * len(study.metrics)), dpi=110, layout="constrained")
    axes = figure.subplots(len(study.metrics), len(data), squeeze=False, sharey=True, sharex="row")
    for line, metric in zip(axes, study.metrics, strict=True):
        for ax, d in zip(line, data, strict=True):
            for place, method in enumerate(methods):
                values = list(scores.get((d, method, metric), {}).values())
                if values:
                    ax.plot(values, [place] * len(values), "o", color=colors[method], alpha=0.55, markersize=4)
                    ax.plot([np.mean(values)], [place], "|", color=colors[method], markersize=14, markeredgewidth=2.5)
            ax.set_title(d, fontsize=9)
            ax.set_xlabel(metric)
            ax.grid(axis="x", alpha=0.3)
        line[0].set_yticks(range(len(methods)), methods, fontsize=8)
        line[0].set_ylim(len(methods) - 0.5, -0.5)
    return figure


def _draw_curves(study: Study, curves: list[dict[str, str]], runs: set[tuple[str, str, int]]) -> Figure:
    """The first metric of ``runs`` on the validation images by iteration: mean over seeds, band of the extremes."""
    metric = next(iter(study.metrics))
    # Longer runs show where a curve goes; other values of other keys would crowd it.
    swept = {m for sweep in study.sweeps if sweep.key != "SOLVER.MAX_ITER" for _, m in sweep.points if ", " in m}
    points: dict = {}
    for row in curves:
        if row.get(metric) and row_key(row, CURVES) in runs and row["method"] not in swept:
            place = points.setdefault(row["data"], {}).setdefault(row["method"], {})
            try:
                place.setdefault(int(row["iteration"]), []).append(float(row[metric]))
            except (KeyError, TypeError, ValueError) as error:
                raise BLPSegError(f"{CURVES}: iteration or {metric} of a row is no number") from error
    data = [d for d in study.data if d in points]
    colors = _colors(m for m in study.methods if any(m in points[d] for d in data))
    columns = min(3, max(1, len(data)))
    lines = -(-max(1, len(data)) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.9, 3.2 * lines), dpi=110, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=False).ravel()
    handles: dict = {}
    for ax in axes[len(data) :]:
        ax.set_visible(False)
    for ax, d in zip(axes, data, strict=False):
        for method in study.methods:
            if method not in points[d]:
                continue
            at = sorted(points[d][method])
            values = [points[d][method][i] for i in at]
            (handles[method],) = ax.plot(at, [np.mean(v) for v in values], color=colors[method], label=method)
            ax.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colors[method], alpha=0.12)
        ax.set(title=d, xlabel="iteration", ylabel=metric)
        ax.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure


def _draw_sweeps(study: Study, scores: Scores) -> Figure:
    """All metrics against the value of each swept key; bars are the standard deviation over seeds."""
    pairs = [(sweep, d) for sweep in study.sweeps for d in sweep.data]
    columns = min(4, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.0 * lines + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(pairs) :]:
        ax.set_visible(False)
    handles: dict = {}
    for ax, (sweep, d) in zip(axes, pairs, strict=False):
        for color, metric in zip(_COLORS, study.metrics, strict=False):
            found = [(value, scores[d, m, metric]) for value, m in sweep.points if (d, m, metric) in scores]
            # The same seeds at each value: what seeds differ in would look like an effect.
            seeds = set.intersection(*(set(s) for _, s in found)) if found else ()
            if seeds:
                spread = [mean_and_spread(s[seed] for seed in seeds) for _, s in found]
                means, deviations = zip(*spread, strict=True)
                handles[metric] = ax.errorbar(
                    range(len(found)), means, np.nan_to_num(deviations), fmt="o-", color=color, capsize=3
                )
                ax.set_xticks(range(len(found)), [f"{value:g}" for value, _ in found])
        ax.set(title=d, xlabel=sweep.name)
        ax.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles) or 1, fontsize=8)
    return figure
