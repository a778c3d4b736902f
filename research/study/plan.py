"""A study's YAML file -> the runs it consists of."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml
from detectron2.config import CfgNode

from blpseg.config import flatten, get_cfg
from blpseg.utils.errors import BLPSegError, describe

__all__ = ["RUN_COLUMNS", "Run", "Study", "Sweep", "load_study"]

_STUDY_KEYS = (
    "config", "options", "seeds", "metrics", "also", "reference", "upper_bound", "compare", "data", "methods", "sweeps",
)  # fmt: skip
_DATA_KEYS = ("config", "options", "prepare", "root", "methods", "upper_bound_of")
_SWEEP_KEYS = ("of", "key", "values", "data", "seeds")
# What a row says of its run beside the scores; ``metrics`` tells what these are of.
RUN_COLUMNS = (
    "data", "method", "seed", "iterations", "iteration", "seconds", "config", "options", "root", "prepare", "metrics",
    "digest", "finished", "git_revision", "torch", "device", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A data set of a study.

    Attributes:
        config, options: of its runs, the words in braces not filled in.
        prepare: the commands that make it; ``recipe``: the same, or the root if there are none, with the words in
            braces.
        root: its DETECTRON2_DATASETS; "" leaves the environment as it is.
        methods: those that run on it.
        upper_bound_of: data set whose scores of the upper bound count here too, as when only scribbles differ.
    """

    name: str
    config: str
    options: dict
    prepare: tuple[tuple[str, ...], ...]
    root: str
    recipe: str
    methods: tuple[str, ...]
    upper_bound_of: str


@dataclass(frozen=True)
class Sweep:
    """One key of a method over values; ``points`` are (value, method name), the method's own value among them."""

    name: str
    key: str
    data: tuple[str, ...]
    points: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        data, method, seed: its place in the grid.
        config: path of the config file.
        options: alternating keys and values, all strings.
        root: DETECTRON2_DATASETS of the run; "" leaves the environment as it is.
        digest: of what decides the result: the config keys that differ from the defaults, the seed and the commands
            that make the data, or its root where there are none; not of the code, nor of what lies in the data's
            folders.
    """

    data: str
    method: str
    seed: int
    config: str
    options: tuple[str, ...]
    root: str
    digest: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.data, self.method, self.seed

    @property
    def folder(self) -> str:
        """Of its files, relative to the study's."""
        return os.path.join("runs", slug(self.data), slug(self.method), f"seed{self.seed}")

    def cfg(self) -> CfgNode:
        """Its complete config."""
        return get_cfg(self.config, self.options)


@dataclass(frozen=True)
class Study:
    """What :func:`load_study` reads.

    Attributes:
        metrics: column -> "task/metric" of the final evaluation (``report/...`` included), or ``train/NAME`` for the
            mean of a scalar in metrics.json over the last tenth of its lines. The first is the one that curves show.
        also: further columns, which are only averaged.
        reference: method that the others are paired with; upper_bound: method that shares are taken of, or "".
        compare: further pairs (method, other), whose differences stand in a table of their own.
        data, methods, seeds: the grid, in order; ``runs`` lists it, seeds outermost, so that a study cut short has
            whole comparisons.
    """

    metrics: dict[str, str]
    also: dict[str, str]
    reference: str
    upper_bound: str
    seeds: tuple[int, ...]
    data: dict[str, Data]
    methods: dict[str, dict]
    compare: tuple[tuple[str, str], ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    runs: tuple[Run, ...] = field(default=(), repr=False)

    @property
    def columns(self) -> dict[str, str]:
        """All that is measured: ``metrics`` and ``also``."""
        return {**self.metrics, **self.also}


def slug(name: str) -> str:
    """A file name made of ``name``."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")


def load_study(path: str, output: str, opts: Sequence[str] = ()) -> Study:
    """Read a study file; docs/RESULTS.md describes its keys.

    Args:
        path: of the YAML file.
        output: the study's folder; ``{output}`` in options, roots and commands stands for it, ``{data}`` for
            $DETECTRON2_DATASETS.
        opts: alternating config keys and values for all runs, above the options of the study and of its data; what a
            method or a sweep sets stays.

    Raises:
        BLPSegError: it cannot be read, a key is unknown or missing, or a config of the grid is wrong.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BLPSegError(f"{path}: not a readable study file: {describe(error)}") from error
    _check_keys(content, _STUDY_KEYS, path, required=("seeds", "metrics", "data", "methods"))
    for part in ("metrics", "data", "methods", "also", "sweeps"):
        if part in ("also", "sweeps") and content.get(part) in (None, {}):
            continue
        if not isinstance(content[part], dict) or not content[part]:
            raise BLPSegError(f"{path}: {part} must map names to what they stand for, and have one at least")
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise BLPSegError(f"{path}: seeds must be a list of whole numbers from 0 on, e.g. [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise BLPSegError(f"{path}: seeds {seeds}: one is there twice")

    words = {"output": output, "data": os.environ.get("DETECTRON2_DATASETS", "datasets")}
    methods = {str(name): _options(entry, f"{path}: methods: {name}") for name, entry in content["methods"].items()}
    common = _options(content.get("options"), f"{path}: options")
    if len(opts) % 2:
        raise BLPSegError(f"--opts takes config keys and values in turn; {opts[-1]} has no value")
    above = dict(zip(opts[::2], opts[1::2], strict=True))
    data = {}
    for name, entry in content["data"].items():
        where = f"{path}: data: {name}"
        entry = entry or {}
        _check_keys(entry, _DATA_KEYS, where)
        config = entry.get("config", content.get("config"))
        if not config:
            raise BLPSegError(f"{where}: no config; give one here or for the whole study")
        if not isinstance(config, str):
            raise BLPSegError(f"{where}: config must be the path of a file, not {config!r}")
        prepare = entry.get("prepare", [])
        if not isinstance(prepare, list) or not all(isinstance(command, list) and command for command in prepare):
            raise BLPSegError(f"{where}: prepare must be a list of commands, each a list: [[script.py, --flag, value]]")
        data[str(name)] = Data(
            str(name),
            config,
            {**common, **_options(entry.get("options"), where), **above},
            tuple(tuple(_fill(str(word), words) for word in command) for command in prepare),
            _fill(str(entry.get("root") or ""), words),
            "\n".join(" ".join(map(str, command)) for command in prepare) or str(entry.get("root") or ""),
            tuple(_known(entry.get("methods", list(methods)), methods, f"{where}: methods")),
            _known([entry.get("upper_bound_of", name)], [str(n) for n in content["data"]], f"{where}: upper_bound_of")[
                0
            ],
        )
    reference = str(content.get("reference") or next(iter(methods)))
    upper_bound = str(content.get("upper_bound") or "")
    _known([reference], methods, f"{path}: reference")
    _known([upper_bound] if upper_bound else [], methods, f"{path}: upper_bound")
    compare = content.get("compare") or []
    if not isinstance(compare, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in compare):
        raise BLPSegError(f"{path}: compare must be a list of pairs of methods: [[BLP + LAM, LAM]]")
    compare = tuple((first, second) for first, second in (_known(p, methods, f"{path}: compare") for p in compare))
    metrics, also = ({str(k): str(v) for k, v in (content.get(part) or {}).items()} for part in ("metrics", "also"))
    for column in [*metrics, *also]:
        if column in RUN_COLUMNS or (column in metrics and column in also):
            raise BLPSegError(f"{path}: the column {column} is there already; give it another name")

    grid = [(d, m, tuple(seeds)) for d in data for m in data[d].methods]
    sweeps = []
    for name, entry in (content.get("sweeps") or {}).items():
        where = f"{path}: sweeps: {name}"
        sweep, variants = _sweep(str(name), entry, methods, data, where)
        sweeps.append(sweep)
        methods |= variants
        chosen = tuple(_known(entry.get("seeds", seeds), seeds, f"{where}: seeds"))
        grid += [(d, m, chosen) for d in sweep.data for m in variants]
    study = Study(
        metrics=metrics,
        also=also,
        reference=reference,
        upper_bound=upper_bound,
        seeds=tuple(seeds),
        data=data,
        methods=methods,
        compare=compare,
        sweeps=tuple(sweeps),
    )
    return Study(**{**vars(study), "runs": tuple(_runs(study, grid, words))})


def _runs(study: Study, grid: list[tuple[str, str, tuple[int, ...]]], words: dict[str, str]):
    folders = {}
    cells = []
    defaults = flatten(get_cfg())
    for d, m, seeds in grid:
        entry = study.data[d]
        given = {**entry.options, **study.methods[m]}
        options = [str(x) for key, value in given.items() for x in (key, _fill(value, words))]
        resolved = flatten(get_cfg(entry.config, options))  # mistakes in it are told before any run starts
        # As it was given: where things lie does not change a result.
        resolved |= given
        own = [f"{key}: {v}" for key, v in sorted(resolved.items()) if defaults.get(key) != v and key != "OUTPUT_DIR"]
        identity = "\n".join([*own, entry.recipe])
        cells.append((entry, m, seeds, options, identity))
    for seed in study.seeds:
        for entry, m, seeds, options, identity in cells:
            if seed not in seeds:
                continue
            digest = hashlib.sha256(f"{seed}\n{identity}".encode()).hexdigest()[:16]
            run = Run(entry.name, m, seed, entry.config, (*options, "SEED", str(seed)), entry.root, digest)
            for part in (run.data, run.method):
                if not slug(part).strip("."):
                    raise BLPSegError(f"study: {part!r} gives no name of a folder; call it otherwise")
            other = folders.setdefault(run.folder, run.key)
            if other != run.key:
                raise BLPSegError(f"study: {other} and {run.key} would share the folder {run.folder}; rename one")
            yield run


def _sweep(name: str, entry, methods: dict, data: dict, where: str) -> tuple[Sweep, dict[str, dict]]:
    _check_keys(entry, _SWEEP_KEYS, where, required=("of", "key", "values"))
    of = _known([entry["of"]], methods, f"{where}: of")[0]
    base = methods[of]
    chosen = tuple(_known(entry.get("data", list(data)), data, f"{where}: data"))
    values = entry["values"]
    if not chosen:
        raise BLPSegError(f"{where}: data is empty; name a data set, or leave it out for all of them")
    if not isinstance(values, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise BLPSegError(f"{where}: values must be a list of numbers")
    own = {_value(data[d], base, entry["key"], where) for d in chosen}
    if len(own) > 1:
        raise BLPSegError(
            f"{where}: {entry['key']} differs between the data sets {', '.join(chosen)}; sweep them apart"
        )
    own = own.pop()
    points, variants = [], {}
    for value in sorted({*values, own}):
        if value == own:
            points.append((float(value), of))
            continue
        if isinstance(own, int) and int(value) != value:
            raise BLPSegError(f"{where}: {entry['key']} takes whole numbers, not {value}")
        method = f"{of}, {name} {value:g}" if float(f"{value:g}") == value else f"{of}, {name} {value!r}"
        points.append((float(value), method))
        variants[method] = {**base, entry["key"]: type(own)(value)}
    return Sweep(name, entry["key"], chosen, tuple(points)), variants


def _value(data: Data, method: dict, key: str, where: str) -> float:
    """What ``key`` is for a method on a data set."""
    value: object = get_cfg(data.config, [str(x) for pair in {**data.options, **method}.items() for x in pair])
    for part in str(key).split("."):
        if not isinstance(value, CfgNode) or part not in value:
            raise BLPSegError(f"{where}: unknown config key {key}")
        value = value[part]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BLPSegError(f"{where}: {key} is {value!r}; a sweep needs a key that is a number")
    return value


def _known(names, known, where: str) -> list:
    """``names``, a list, if each of them is in ``known``; YAML reads a name such as 0.5 as a number."""
    if not isinstance(names, list):
        raise BLPSegError(f"{where}: expected a list, found {names!r}")
    known = list(known)
    for name in names:
        if name not in known and str(name) not in known:
            raise BLPSegError(f"{where}: {name!r} is not in the study; it has {', '.join(map(str, known))}")
    return [name if name in known else str(name) for name in names]


def _check_keys(entry, known: tuple[str, ...], where: str, required: tuple[str, ...] = ()) -> None:
    if not isinstance(entry, dict):
        raise BLPSegError(f"{where}: expected keys with values, found {type(entry).__name__}")
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise BLPSegError(f"{where}: unknown key {key!r}; {hint}")
    missing = [key for key in required if entry.get(key) is None]
    if missing:
        raise BLPSegError(f"{where}: {', '.join(missing)} missing")


def _options(entry, where: str) -> dict[str, object]:
    """Config keys and values."""
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        raise BLPSegError(f"{where}: expected CONFIG.KEY: value, found {type(entry).__name__}")
    return dict(entry)


def _fill(value, words: dict[str, str]):
    if isinstance(value, list):
        return [_fill(item, words) for item in value]
    if not isinstance(value, str):
        return value
    for word, text in words.items():
        value = value.replace(f"{{{word}}}", text)
    return value
