"""Untrusted YAML: bounded in size, depth and time, plain values only."""

from __future__ import annotations

import os
from collections.abc import Mapping

import yaml

from .downloads import fetch
from .errors import BLPSegError, describe

MAX_CHARACTERS = 1 << 18
MAX_NODES = 20_000  # with every alias written out
MAX_DEPTH = 50
MAX_BASES = 20  # files that a config reads


def parse_yaml(text: str, source: str):
    """The result of ``yaml.safe_load``, for untrusted text; ``source`` is its file, for messages.

    Aliases and merge keys are allowed as long as the document stays small when they are written out: PyYAML itself
    builds gigabytes from two kilobytes.

    Raises:
        BLPSegError: it is no YAML, too large or too deep, or holds other than plain values.
    """
    if len(text) > MAX_CHARACTERS:
        raise BLPSegError(f"{source}: more than {MAX_CHARACTERS} characters of YAML; is it the right file?")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}, 0) > MAX_NODES:
            raise BLPSegError(f"{source}: more than {MAX_NODES} values, with its aliases written out; shorten it")
        return loader.construct_document(node)
    except RecursionError as error:
        raise BLPSegError(f"{source}: its YAML is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # a date of month 13, an int of 5000 digits
        raise BLPSegError(f"{source}: not readable YAML ({describe(error)[:300]})") from error


def read_yaml(path: str | os.PathLike):
    """What a YAML file, or a URL as :func:`.fetch` takes it, holds. Raises BLPSegError if it is missing, or as
    :func:`parse_yaml`."""
    path = os.fspath(path)
    try:
        with open(fetch(path), encoding="utf-8") as file:
            return parse_yaml(file.read(MAX_CHARACTERS + 1), path)
    except UnicodeDecodeError as error:
        raise BLPSegError(f"{path}: not readable YAML ({error})") from error


def read_config(path: str | os.PathLike) -> dict:
    """What a YAML config sets, and the files that it and they name as ``_BASE_``, as nested dicts.

    Names in ``_BASE_`` are relative to the file that has them, as in fvcore; of several the last wins.

    Raises:
        BLPSegError: a file is missing or no mapping of config keys, or files name each other in a circle.
    """
    return _read_with_base(os.fspath(path), (), [])


def _size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Nodes of a document with every alias written out; RecursionError for one deeper than MAX_DEPTH or circular."""
    if id(node) in known:
        return known[id(node)]
    if depth > MAX_DEPTH:
        raise RecursionError
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_size(item, known, depth + 1) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or (key.tag.endswith(":int") and len(key.value) > 10):
                raise ValueError(f"line {key.start_mark.line + 1}: a key that is neither text nor a small number")
            size += 1 + _size(value, known, depth + 1)
    known[id(node)] = size
    return size


def _read_with_base(path: str, above: tuple[str, ...], read: list[str]) -> dict:
    """A YAML file over those that its ``_BASE_`` names. The ``_BASE_`` of the files ``above`` led here; ``read`` holds
    all files so far, and grows."""
    read.append(path)
    if path in above or len(read) > MAX_BASES:
        what = "leads in a circle" if path in above else f"stands for more than {MAX_BASES} files"
        raise BLPSegError(f"{read[0]}: its _BASE_ {what}: {' -> '.join((*above[-3:], path))}")
    node = read_yaml(path)
    if not isinstance(node, dict):
        what = "empty" if node is None else f"a {type(node).__name__}"
        raise BLPSegError(f"{path}: {what}, not a mapping of config keys")
    check_plain(node, path)
    bases = node.pop("_BASE_", [])
    merged: dict = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise BLPSegError(f"{path}: _BASE_ {base!r} is not the name of a file, nor a list of names")
        base_path = base if "://" in base else os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if "://" not in base_path:
            base_path = os.path.normpath(base_path)
            if not os.path.isfile(base_path):
                raise BLPSegError(f"{path}: its _BASE_ {base!r} is missing: no such file {base_path}")
        merge_mappings(_read_with_base(base_path, (*above, path), read), merged, path)
    merge_mappings(node, merged, path)
    return merged


def merge_mappings(upper: Mapping, lower: dict, path: str) -> None:
    """Put the values of ``upper``, of the file ``path``, into ``lower``. Raises BLPSegError if a mapping would
    replace a value."""
    for key, value in upper.items():
        if isinstance(value, dict) and key in lower:
            if not isinstance(lower[key], dict):
                raise BLPSegError(f"{path}: {key} is a mapping here and a value in its _BASE_")
            merge_mappings(value, lower[key], path)
        else:
            lower[key] = value


def check_plain(node: dict, source: str, prefix: str = "") -> None:
    """Raises BLPSegError unless keys are text and values what a config holds, none of it costly to evaluate."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str):
            raise BLPSegError(f"{source}: key {name} is a {type(key).__name__}; keys are names like SOLVER.MAX_ITER")
        if isinstance(value, dict):
            check_plain(value, source, f"{name}.")
        elif not isinstance(value, (str, int, float, list, tuple, type(None))):
            raise BLPSegError(
                f"{source}: {name} is a {type(value).__name__}, which no config key takes; quote it as text"
            )
        elif isinstance(value, str) and (len(value) > 10_000 or sum(map(value.count, "([{-+~")) > 1000):
            raise BLPSegError(f"{source}: {name} is {len(value)} characters long; shorten it")
