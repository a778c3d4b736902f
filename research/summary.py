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

_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
Scores = dict[tuple[str, str, str], dict[int, float]]  # (data, method, column) -> seed -> value


def summarize(study: Study, folder: str) -> str:
    """Write ``table.md``, ``scores.png`` and ``curves.png`` from ``runs.csv`` and ``curves.csv`` in ``folder``.

    Rows that are not of the study are left out.

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
    found = [d for d in study.bounds if any(key[0] == d for key in scores)]
    if not found:
        raise BLPSegError(f"{os.path.join(folder, ROWS)}: no finished run of this study to sum up; run it first")
    text = "\n\n".join(_table(study, scores, d) for d in found) + "\n"
    write_bytes_atomic(os.path.join(folder, "table.md"), text.encode())
    _draw_scores(study, scores, found).savefig(os.path.join(folder, "scores.png"))
    first, most = next(iter(study.metrics)), max(map(len, study.methods.values()))
    points: dict[str, dict[str, dict[float, list[float]]]] = {}
    for (data, method, seed), rows in read_rows(os.path.join(folder, CURVES)).items():
        if (data, method, seed) in runs and len(study.methods[method]) == most:  # others would crowd the figure
            curve = points.setdefault(data, {}).setdefault(method, {})
            for row in rows:
                at = _number(row.get("iteration"), CURVES, "iteration")
                curve.setdefault(at, []).append(_number(row.get(first), CURVES, first))
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
    headers += [f"{main[0]}, share of {study.upper_bound}", *columns[2:]]

    def differences(method: str, other: str) -> list[str]:
        """Of the main columns, over the seeds that both methods have."""
        sides = ((scores.get((data, m, column), {}) for m in (method, other)) for column in main)
        return [_spread((a[seed] - b[seed] for seed in a if seed in b), "+.1f") for a, b in sides]

    rows = []
    for method in study.methods:
        values = [scores.get((data, method, column), {}) for column in columns]
        if any(values):
            bound = scores.get((study.bounds[data], study.upper_bound, main[0]), {})
            shares = [100 * value / bound[seed] for seed, value in values[0].items() if bound.get(seed)]
            row = [method, max(map(len, values)), *(_spread(v.values()) for v in values[:2])]
            row += differences(method, study.reference) if method != study.reference else [""] * len(main)
            row.append(f"{np.mean(shares):.0f} %" if shares else "")
            rows.append(row + [_spread(v.values(), ".2f") for v in values[2:]])
    parts = [f"### {data}", tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)]
    pairs = [(" - ".join(f"({m})" if " + " in m else m for m in pair), *differences(*pair)) for pair in study.compare]
    if pairs := [pair for pair in pairs if any(pair[1:])]:
        parts.append(tabulate(pairs, headers=["difference", *main], tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)


def _spread(values: Iterable[float], spec: str = ".1f") -> str:
    """Mean and sample standard deviation (n - 1); of differences also how many are above 0."""
    values = np.array(list(values))
    if not len(values):
        return ""
    text = f"{values.mean():{spec}}" + (f" ± {values.std(ddof=1):{spec.lstrip('+')}}" if len(values) > 1 else "")
    return text + f" ({(values > 0).sum()}/{len(values)} higher)" * spec.startswith("+")


def _draw_scores(study: Study, scores: Scores, data: list[str]) -> Figure:
    """A dot for each seed, a bar at the mean; a row of panels for each main column, a column for each data set."""
    methods, main = list(study.methods), list(study.metrics)[:2]
    size = (2.2 + 2.7 * len(data), (0.28 * len(methods) + 0.9) * len(main))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(len(main), len(data), squeeze=False, sharey=True, sharex="row")
    for line, column in zip(axes, main, strict=True):
        for ax, d in zip(line, data, strict=True):
            for place, method in enumerate(methods):
                values, color = [*scores.get((d, method, column), {}).values()], _COLORS[place % len(_COLORS)]
                ax.plot(values, [place] * len(values), "o", color=color, alpha=0.55, markersize=4)
                ax.plot([np.mean(values or [np.nan])], [place], "|", color=color, markersize=14, markeredgewidth=2.5)
            ax.set(title=d, xlabel=column)
            ax.grid(axis="x", alpha=0.3)
        line[0].set_yticks(range(len(methods)), methods, fontsize=8)
        line[0].set_ylim(len(methods) - 0.5, -0.5)
    return figure


def _draw_curves(study: Study, points: dict, column: str) -> Figure:
    """``column`` on the validation images by iteration: mean over seeds, band of the extremes."""
    figure = Figure(figsize=(3.6 * len(points) + 2.4, 3.2), dpi=110, layout="constrained")
    axes, handles = figure.subplots(1, len(points), squeeze=False)[0], {}
    for ax, data in zip(axes, [d for d in study.bounds if d in points], strict=True):
        for place, method in enumerate(study.methods):
            if found := points[data].get(method):
                at, color = sorted(found), _COLORS[place % len(_COLORS)]
                (handles[method],) = ax.plot(at, [np.mean(found[i]) for i in at], color=color)
                ax.fill_between(at, [min(found[i]) for i in at], [max(found[i]) for i in at], color=color, alpha=0.12)
        ax.set(title=data, xlabel="iteration", ylabel=column)
        ax.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure
