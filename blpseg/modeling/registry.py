"""Registered names and sections of a config."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from ..utils.errors import BLPSegError


def look_up(registry: Registry, name: str, key: str):
    """What ``registry`` has as ``name``, the value of the config's ``key``. Raises BLPSegError, with the names that it
    has, if it has none such."""
    if name not in registry:
        known = ", ".join(sorted(known for known, _ in registry))
        raise BLPSegError(
            f"{key}: {name!r} is unknown; choose among {known}; "
            "one of your own needs the script that registers it (docs/EXTENDING.md)"
        )
    return registry.get(name)


def keywords(section: CfgNode) -> dict[str, Any]:
    """The keys of a config's section as the arguments of what it configures: SIGMA_XY is sigma_xy."""
    return {key.lower(): value for key, value in section.items()}
