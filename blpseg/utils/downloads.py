"""Downloads: one cache entry for each URL, always inside the cache, always complete."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import uuid
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote
from urllib.request import urlopen

from .errors import BLPSegError, describe

logger = logging.getLogger(__name__)

_TIMEOUT = 60  # seconds without a byte


def cache_path(url: str) -> Path:
    """Where the file of a URL is kept: in a folder named by the SHA-256 of the whole URL, under its last name."""
    root = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    last = unquote(re.split("[?#]", url)[0]).rsplit("/", 1)[-1]
    name = re.sub(r"[^\w.+=-]", "_", last, flags=re.ASCII)[-100:].lstrip(".")
    return root / "by_url" / hashlib.sha256(url.encode()).hexdigest()[:32] / (name or "file")


def fetch(path: str) -> str:
    """The local file behind ``path``, downloaded once if it is a URL.

    Args:
        path: a local path; an ``http``, ``https`` or ``ftp`` URL; Detectron2's ``detectron2://`` and ``catalog://``; or
            another scheme that PathManager knows. ``#sha256=<64 hex digits>`` at its end asks for that content.

    Raises:
        BLPSegError: no such file, not a regular file, a failed or cut download, or another content than asked for.
    """
    name, _, digest = path.partition("#sha256=")
    if digest and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise BLPSegError(f"{path}: #sha256= takes the 64 hexadecimal digits that sha256sum prints")
    url = _web_address(name)
    local = str(_download(name, url, digest.lower())) if url else _local_path(name)
    if not os.path.isfile(local):
        what = "not a regular file" if os.path.exists(local) else "no such file"
        raise BLPSegError(f"{path}: {what}; give the path of a file")
    if digest and not url and _sha256(local) != digest.lower():
        raise BLPSegError(f"{name}: its SHA-256 is not {digest}; fetch it again from where the digest comes from")
    return local


def _web_address(path: str) -> str:
    """The URL to download, "" for what PathManager opens otherwise."""
    if path.startswith("catalog://"):
        from detectron2.checkpoint.catalog import ModelCatalog

        try:
            path = ModelCatalog.get(path.removeprefix("catalog://"))
        except RuntimeError as error:
            raise BLPSegError(f"{path}: {describe(error)}") from error
    path = re.sub("^detectron2://", "https://dl.fbaipublicfiles.com/detectron2/", path)
    return path if path.startswith(("http://", "https://", "ftp://")) else ""


def _local_path(path: str) -> str:
    if "://" not in path:
        return path
    from detectron2.utils.file_io import PathManager

    try:
        return PathManager.get_local_path(path)
    except Exception as error:  # every scheme of PathManager fails in its own way
        raise BLPSegError(f"{path}: cannot be fetched ({describe(error)})") from error


def _download(name: str, url: str, digest: str) -> Path:
    from iopath.common.file_io import file_lock

    target = cache_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(target)):  # the processes of a machine download it once
        if target.is_file() and (not digest or _sha256(target) == digest):
            return target
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            logger.info(f"downloading {url}")
            found = _receive(url, temporary)
            if digest and found != digest:
                raise BLPSegError(f"{name}: its SHA-256 is {found}, not {digest}; it is not the file that was meant")
            os.replace(temporary, target)
        except (OSError, ValueError, HTTPException) as error:
            raise BLPSegError(
                f"{name}: cannot be fetched ({describe(error)}); download it elsewhere and put it at {target}, or give "
                "the path where it lies"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
    return target


def _receive(url: str, path: Path) -> str:
    """Write what ``url`` gives to ``path``; its SHA-256. OSError if fewer bytes arrive than were announced."""
    digest, received = hashlib.sha256(), 0
    with urlopen(url, timeout=_TIMEOUT) as answer, open(path, "wb") as file:
        while block := answer.read(1 << 20):
            file.write(block)
            digest.update(block)
            received += len(block)
        announced = answer.headers.get("Content-Length")
        file.flush()
        os.fsync(file.fileno())
    if announced is not None and received != int(announced):
        raise OSError(f"{received} of {announced} bytes came")
    return digest.hexdigest()


def _sha256(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
