"""Errors that the user can mend, and their messages of one line."""

from __future__ import annotations

import os

__all__ = ["BLPSegError", "debug_enabled", "describe", "printable"]


class BLPSegError(Exception):
    """A mistake in the input. The message is one line: what is wrong, which file, how to mend it."""


def debug_enabled() -> bool:
    """Whether tracebacks are wanted (``--debug`` or ``BLPSEG_DEBUG=1``)."""
    return os.environ.get("BLPSEG_DEBUG", "") not in ("", "0")


def describe(error: BaseException) -> str:
    """The message of an exception on one line, fit for a terminal."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def printable(text: str) -> str:
    """``text`` with escapes for the characters that a terminal obeys or cannot show; file names may hold them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
