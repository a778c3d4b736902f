"""SIGTERM, SIGHUP (a terminal that closes) and Ctrl-C as a request to stop, served where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE_S = 3.0  # a terminal's Ctrl-C reaches a child twice, once through its parent; a person's second is later


class StopRequest:
    """Catches the signals of this process from :meth:`install` on.

    Outside :meth:`deferred` the process leaves at once with status 128 + signal. Inside, the signal is kept in
    ``signum`` for the training loop to see after its step; a second Ctrl-C leaves without saving. Until :meth:`ready`
    there is nothing to clean up, and an exception in the middle of an import could get lost: the process just ends.
    """

    def __init__(self):
        self.signum = 0
        self._deferred = self._ready = False
        self._process = None
        self._since = 0.0

    def install(self) -> None:
        """From the main thread; elsewhere signals are left as they are."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._process, self._ready = os.getpid(), False
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # `nohup` has SIGHUP ignored
                signal.signal(signum, self._handle)

    def ready(self) -> None:
        """The run begins. Installs the handlers if nobody has."""
        if self._process != os.getpid():
            self.install()
        self._ready = True

    @property
    def status(self) -> int:
        """The exit status that shows a shell or scheduler which signal ended the run."""
        return 128 + self.signum

    def _handle(self, signum, frame) -> None:
        if os.getpid() != self._process:
            return  # a forked loader worker: the process that started it decides
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
            if not self._deferred:
                self._leave("interrupted")
        elif signum == signal.SIGINT and time.monotonic() - self._since > PATIENCE_S:
            self._leave("interrupted twice, nothing more is saved")

    def _leave(self, words: str) -> None:
        if os.environ.get("BLPSEG_QUIET_RANK") != "1":
            print(f"{words} by {signal.Signals(self.signum).name}", file=sys.stderr, flush=True)
        if not self._ready:
            sys.stdout.flush()
            os._exit(self.status)
        raise SystemExit(self.status)

    @contextlib.contextmanager
    def deferred(self, flag: bool = True):
        """Keep a signal for later inside this block (or, with False, obey it at once; one kept so far as well)."""
        before, self._deferred = self._deferred, flag
        try:
            if self.signum and not flag:
                self._leave("interrupted")
            yield
        finally:
            self._deferred = before


STOP = StopRequest()  # of this process: signals are per process too
