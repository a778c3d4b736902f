"""What a user's mistake is told with: one line."""

from __future__ import annotations

import os

__all__ = ["BLPSegError", "debug_enabled", "describe"]


class BLPSegError(Exception):
    """A mistake in the input. The message is one line: what is wrong, which file, how to mend it."""


def debug_enabled() -> bool:
    """Whether tracebacks are wanted (``--debug`` or ``BLPSEG_DEBUG=1``)."""
    return os.environ.get("BLPSEG_DEBUG", "") not in ("", "0")


def describe(error: BaseException) -> str:
    """The message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
