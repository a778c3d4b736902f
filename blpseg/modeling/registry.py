"""Looking up registered names of a config."""

from __future__ import annotations

from detectron2.utils.registry import Registry

from ..utils.errors import BLPSegError

__all__ = ["look_up"]


def look_up(registry: Registry, name: str, key: str):
    """What ``registry`` has as ``name``, the value of the config's ``key``.

    Raises:
        BLPSegError: nothing is registered by that name; the message lists what is.
    """
    if name not in registry:
        known = ", ".join(sorted(known for known, _ in registry))
        raise BLPSegError(f"{key}: {name!r} is unknown; choose among {known}")
    return registry.get(name)
