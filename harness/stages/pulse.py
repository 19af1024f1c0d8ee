"""Whether a process that was started here still lives: it beats on a pipe, and its parent listens.

A process that neither beats nor uses its CPU for SILENT_S is silent, such as one that was stopped by a signal. Both
are asked for: a library that computes without releasing Python's lock cannot beat, but uses its CPU; a process that
waits for its peers uses no CPU, but beats.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BEAT_S = 5.0
SILENT_S = 60.0
"""Seconds after which a silent process is ended, and with it those that wait for it."""
_STEP_S = 1.0


class Clock:
    """Counts the time in which this process watched: not the time in which it was stopped or the machine slept."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds = 0.0

    def tick(self) -> float:
        """Return the seconds watched so far. Call it at least once a second."""
        now = time.monotonic()
        self.seconds += min(now - self._last, _STEP_S)
        self._last = now
        return self.seconds


class Pulse:
    """The parent's view of one process; without a pid, one on another machine, whose host beats while it computes."""

    def __init__(self, pid: int | None):
        self._pid = pid
        self._heard = threading.Event()
        self._clock = Clock()
        self._since = 0.0
        self._cpu_s = -1.0

    def beat(self) -> None:
        """Note that the process was heard; may be called from another thread."""
        self._heard.set()

    def is_silent(self) -> bool:
        """Return whether nothing was heard for SILENT_S, and no CPU time was used. Call it at least once a second."""
        now = self._clock.tick()
        if self._heard.is_set():
            self._heard.clear()
            self._since = now
        elif now - self._since >= BEAT_S and (used := self.cpu_seconds()) > self._cpu_s:
            self._cpu_s, self._since = used, now
        return now - self._since >= SILENT_S

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used, or -1 where it cannot be seen."""
        import psutil

        if self._pid is None:
            return -1.0
        try:
            times = psutil.Process(self._pid).cpu_times()
        except psutil.Error:
            return -1.0
        return times.user + times.system


def keep_beating(say: Callable[[], None]) -> None:
    """Call `say` every BEAT_S from a thread, as long as this process lives."""

    def beat() -> None:
        while True:
            say()
            time.sleep(BEAT_S)

    threading.Thread(target=beat, name="pulse", daemon=True).start()
