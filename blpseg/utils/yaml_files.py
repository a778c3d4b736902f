"""YAML that others send: bounded in size, depth and time, and nothing but plain values."""

from __future__ import annotations

import yaml

from .errors import BLPSegError, describe

__all__ = ["parse_yaml"]

MAX_CHARACTERS = 1 << 18
MAX_NODES = 20_000  # with every alias written out
MAX_DEPTH = 50


def parse_yaml(text: str, source: str):
    """What ``yaml.safe_load`` gives, for text that need not be trusted.

    Aliases and merge keys are allowed as long as the document stays small when they are written out: PyYAML itself
    builds gigabytes from two kilobytes.

    Args:
        text: one YAML document.
        source: its file, for messages.

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
            raise BLPSegError(f"{source}: its YAML aliases stand for more than {MAX_NODES} values; write them out")
        return loader.construct_document(node)
    except RecursionError as error:
        raise BLPSegError(f"{source}: its YAML is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # a date of month 13, an int of 5000 digits
        raise BLPSegError(f"{source}: not readable YAML ({describe(error)[:300]})") from error


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
