"""Decisions that the processes of a run share."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.utils import comm

from ..utils.errors import BLPSegError


class PeerFailure(BLPSegError):
    """Another process of this run failed; its own message says why."""


def on_main(function: Callable):
    """Call ``function()`` in the main process only; returns its result there and None elsewhere.

    Every process must call this.

    Raises:
        BLPSegError, OSError: what ``function`` raised, in the main process; :class:`PeerFailure` in the others.
    """
    result = error = None
    if comm.is_main_process():
        try:
            result = function()
        except (BLPSegError, OSError) as caught:
            error = caught
    failed = comm.all_gather(error is not None)[0]
    if error is not None:
        raise error
    if failed:
        raise PeerFailure("the main process failed; its message says why")
    return result
