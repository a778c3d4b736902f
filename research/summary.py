"""Table and figures of a study, from its CSV files alone."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from blpseg.utils.errors import BLPSegError
from blpseg.utils.files import write_bytes_atomic

from .study import CURVES, ROWS, Study, read_rows

__all__ = ["mean_and_spread", "paired", "summarize"]

_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
Scores = dict[tuple[str, str, str], dict[int, float]]  # (data, method, column) -> seed -> value


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter NaN for one value, both for none."""
    values = np.asarray(list(values), dtype=float)
    mean = float(values.mean()) if len(values) else float("nan")
    return mean, float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def paired(scores: dict[int, float], reference: dict[int, float]) -> list[float]:
    """Differences to the reference of the seeds that both have."""
    return [scores[seed] - reference[seed] for seed in scores if seed in reference]


def summarize(study: Study, folder: str) -> str:
    """Write ``table.md``, ``scores.png`` and, where there are evaluations on the way, ``curves.png``.

    Args:
        study: gives order, reference and upper bound; rows of methods that it does not have are left out.
        folder: holds ``runs.csv`` and ``curves.csv``, and takes the results.

    Returns:
        the table, Markdown.

    Raises:
        BLPSegError: there is no run to sum up, or a file is not a study's.
    """
    scores: Scores = {}
    runs = {run.key for run in study.runs}
    for (data, method, seed), rows in read_rows(os.path.join(folder, ROWS)).items():
        for column in study.metrics if (data, method, seed) in runs else ():
            value = _number(rows[-1].get(column), ROWS, column)
            if not np.isnan(value):
                scores.setdefault((data, method, column), {})[seed] = value
    data = [d for d in study.bounds if any(key[0] == d for key in scores)]
    if not data:
        raise BLPSegError(f"{os.path.join(folder, ROWS)}: no finished run of this study to sum up; run it first")
    text = "\n\n".join(_table(study, scores, d) for d in data) + "\n"
    write_bytes_atomic(os.path.join(folder, "table.md"), text.encode())
    _draw_scores(study, scores, data).savefig(os.path.join(folder, "scores.png"))
    first, most = next(iter(study.metrics)), max(map(len, study.methods.values()))
    points: dict[tuple[str, str], dict[int, list[float]]] = {}
    for (d, method, seed), rows in read_rows(os.path.join(folder, CURVES)).items():
        if (d, method, seed) in runs and len(study.methods[method]) == most:  # others would crowd the figure
            for row in rows:
                place = points.setdefault((d, method), {}).setdefault(int(_number(row["iteration"], CURVES, "it")), [])
                place.append(_number(row.get(first), CURVES, first))
    if points:
        _draw_curves(study, points, first).savefig(os.path.join(folder, "curves.png"))
    return text


def _number(text: str | None, file: str, column: str) -> float:
    try:
        return float(text or "nan")
    except ValueError as error:
        raise BLPSegError(f"{file}: {column} is {text!r} in one of the rows, which is no number") from error


def _table(study: Study, scores: Scores, data: str) -> str:
    columns = list(study.metrics)
    main = columns[:2]
    headers = ["method", "seeds", *main, *(f"{column} - {study.reference}" for column in main)]
    headers += [f"{main[0]}, share of {study.upper_bound}"] * bool(study.upper_bound) + columns[2:]
    rows = []
    for method in study.methods:
        values = [scores.get((data, method, column), {}) for column in columns]
        if not any(values):
            continue
        row = [method, max(map(len, values)), *(_spread(v.values()) for v in values[:2])]
        others = [scores.get((data, study.reference, column), {}) for column in main]
        row += [_difference(paired(v, o)) * (method != study.reference) for v, o in zip(values, others, strict=False)]
        if study.upper_bound:
            bound = scores.get((study.bounds[data], study.upper_bound, main[0]), {})
            shares = [100 * value / bound[seed] for seed, value in values[0].items() if bound.get(seed)]
            row.append(f"{np.mean(shares):.0f} %" if shares else "")
        rows.append(row + [_spread(v.values(), ".2f") for v in values[2:]])
    parts = [f"### {data}", tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)]
    pairs = []
    for pair in study.compare:
        first, second = ([scores.get((data, method, column), {}) for column in main] for method in pair)
        differences = [paired(a, b) for a, b in zip(first, second, strict=True)]
        if any(differences):
            pairs.append([" - ".join(f"({m})" if " + " in m else m for m in pair), *map(_difference, differences)])
    if pairs:
        parts.append(tabulate(pairs, headers=["difference", *main], tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)


def _difference(values: list[float]) -> str:
    higher = sum(d > 0 for d in values)
    return f"{_spread(values, '+.1f')} ({higher}/{len(values)} higher)" if values else ""


def _spread(values: Iterable[float], spec: str = ".1f") -> str:
    mean, deviation = mean_and_spread(values)
    if np.isnan(mean):
        return ""
    return f"{mean:{spec}}" if np.isnan(deviation) else f"{mean:{spec}} ± {deviation:{spec.lstrip('+')}}"


def _draw_scores(study: Study, scores: Scores, data: list[str]) -> Figure:
    """A dot for each seed, a bar at the mean; a row of panels for each main column, a column for each data set."""
    methods, main = list(study.methods), list(study.metrics)[:2]
    size = (2.2 + 2.7 * len(data), (0.28 * len(methods) + 0.9) * len(main))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(len(main), len(data), squeeze=False, sharey=True, sharex="row")
    for line, column in zip(axes, main, strict=True):
        for ax, d in zip(line, data, strict=True):
            for place, method in enumerate(methods):
                values = list(scores.get((d, method, column), {}).values())
                color = _COLORS[place % len(_COLORS)]
                ax.plot(values, [place] * len(values), "o", color=color, alpha=0.55, markersize=4)
                if values:
                    ax.plot([np.mean(values)], [place], "|", color=color, markersize=14, markeredgewidth=2.5)
            ax.set(title=d, xlabel=column)
            ax.grid(axis="x", alpha=0.3)
        line[0].set_yticks(range(len(methods)), methods, fontsize=8)
        line[0].set_ylim(len(methods) - 0.5, -0.5)
    return figure


def _draw_curves(study: Study, points: dict[tuple[str, str], dict[int, list[float]]], column: str) -> Figure:
    """The first column on the validation images by iteration: mean over seeds, band of the extremes."""
    data = [d for d in study.bounds if any(key[0] == d for key in points)]
    columns = min(3, len(data))
    lines = -(-len(data) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.9, 3.2 * lines), dpi=110, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    handles: dict = {}
    for ax in axes[len(data) :]:
        ax.set_visible(False)
    for ax, d in zip(axes, data, strict=False):
        for place, method in enumerate(study.methods):
            if found := points.get((d, method)):
                at, color = sorted(found), _COLORS[place % len(_COLORS)]
                (handles[method],) = ax.plot(at, [np.mean(found[i]) for i in at], color=color)
                ax.fill_between(at, [min(found[i]) for i in at], [max(found[i]) for i in at], color=color, alpha=0.12)
        ax.set(title=d, xlabel="iteration", ylabel=column)
        ax.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure
