"""Files and folders by path. A path with "://" goes to Detectron2's PathManager, which is loaded only then."""

from __future__ import annotations

import errno
import os
from typing import IO, Any

__all__ = ["data_root", "exists", "isdir", "isfile", "listdir", "local_path", "makedirs", "open_file"]


def data_root() -> str:
    """``$DETECTRON2_DATASETS``, by default ``datasets``: asked at use, so that it can still be set after import."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def _manager(path: str):
    if "://" not in path:
        return None
    from detectron2.utils.file_io import PathManager

    return PathManager


def open_file(path: str, mode: str = "r") -> IO[Any]:
    """As :func:`open`, but what is read must be an ordinary file: opening a pipe would wait for a writer.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    if manager := _manager(path):
        return manager.open(path, mode)
    if "r" in mode and os.path.exists(path) and not os.path.isfile(path):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise OSError(errno.EINVAL, "not an ordinary file", path)
    return open(path, mode)


def exists(path: str) -> bool:
    """As :func:`os.path.exists`."""
    manager = _manager(path)
    return manager.exists(path) if manager else os.path.exists(path)


def isfile(path: str) -> bool:
    """As :func:`os.path.isfile`."""
    manager = _manager(path)
    return manager.isfile(path) if manager else os.path.isfile(path)


def isdir(path: str) -> bool:
    """As :func:`os.path.isdir`."""
    manager = _manager(path)
    return manager.isdir(path) if manager else os.path.isdir(path)


def listdir(path: str) -> list[str]:
    """As :func:`os.listdir`."""
    manager = _manager(path)
    return manager.ls(path) if manager else os.listdir(path)


def makedirs(path: str) -> None:
    """Make a folder and those above it; one that exists is fine."""
    if manager := _manager(path):
        manager.mkdirs(path)
    elif path:
        os.makedirs(path, exist_ok=True)


def local_path(path: str) -> str:
    """Where the file lies on this machine; a remote one is fetched first."""
    manager = _manager(path)
    return manager.get_local_path(path) if manager else path
