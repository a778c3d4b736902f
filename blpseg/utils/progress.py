"""Progress: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0


class _Lines(tqdm):
    """A bar whose every state is a line of its own; the last one comes with :meth:`close`."""

    disable: bool

    @staticmethod
    def status_printer(file):
        def print_line(text: str) -> None:
            file.write(f"{text.strip()}\n")
            file.flush()

        return print_line

    def clear(self, nolock: bool = False) -> None:
        """Nothing to make room for when ``tqdm.write`` prints."""

    def refresh(self, nolock: bool = False, lock_args=None) -> None:
        if not nolock:  # nor anything to draw again after it
            super().refresh(lock_args=lock_args)

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]  # tqdm's types lack it
            self.sp(str(self))


def progress_bar(*iterable: Any, **options: Any) -> tqdm:
    """``tqdm(*iterable, **options)`` on stderr. Where that is no terminal, a line every 30 s and one at the end."""
    if sys.stderr.isatty():
        settings: dict[str, Any] = {"mininterval": 0.5, **options}
        return tqdm(*iterable, file=sys.stderr, **settings)  # type: ignore[call-overload]
    # A delay leaves the first state out, which is always 0 %.
    settings = {**options, "mininterval": LINE_SECONDS, "delay": 1e-9}
    return _Lines(*iterable, file=sys.stderr, ascii=True, **settings)  # type: ignore[call-overload]
