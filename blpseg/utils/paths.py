"""Where the data lie, and opening files that might be something else."""

from __future__ import annotations

import errno
import os
from typing import IO, Any


def data_root() -> str:
    """``$DETECTRON2_DATASETS``, by default ``datasets``: asked at use, so that it can still be set after import."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def open_file(path: str, mode: str = "r") -> IO[Any]:
    """As :func:`open`, for reading an ordinary file: opening a pipe would wait for a writer.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not an ordinary file", path)
    return open(path, mode)
