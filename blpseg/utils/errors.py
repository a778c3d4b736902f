"""Errors that the user can mend, and their messages of one line."""

from __future__ import annotations

import os
import traceback


class BLPSegError(Exception):
    """A mistake in the input. The message is one line: what is wrong, which file, how to mend it."""


def debug_enabled() -> bool:
    """Whether tracebacks are wanted (``--debug`` or ``BLPSEG_DEBUG=1``)."""
    return os.environ.get("BLPSEG_DEBUG", "") not in ("", "0")


def describe(error: BaseException) -> str:
    """The message of an exception on one line, fit for a terminal."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def one_line(error: BaseException) -> str:
    """What to report of an exception: its message if it is the user's or the operating system's, else also that it is a
    defect of ours, and where."""
    if isinstance(error, (BLPSegError, OSError)):
        return describe(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unexpected {type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}: {describe(error)} "
        "(a defect: please report it with the traceback that --debug or BLPSEG_DEBUG=1 shows)"
    )


def printable(text: str) -> str:
    """``text`` with escapes for the characters that a terminal obeys or cannot show; file names may hold them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
