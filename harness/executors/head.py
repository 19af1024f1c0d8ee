"""Whether the head of a Ray cluster still answers, for a run that uses it.

A driver of Ray is ended by Ray, in its own words and without a chance to say anything, some time after the head died.
This finds it out before, so that the run can end with what it has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

LOST_S = 15.0
"""Seconds without a connection to the head after which it is lost."""
LEAVE_S = 20.0
"""Seconds for Ray to be left after that: its own cleaning waits for the head, some of it out of reach of signals."""
LOOK_S = 1.0
PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
"""Ray's own limit in this process, in seconds: far beyond ours, since at its end Ray ends the process."""
_SIGNAL = signal.SIGALRM
"""Sent to the main thread; its handler is ours for as long as a head is watched."""


class Head:
    """Watches the port of a head from a thread; when it is lost, KeyboardInterrupt is raised in the main thread.

    If the main thread does not get out of Ray, `last_words` is called in the watching thread, and the process is ended
    with `exit_code`.
    """

    def __init__(self, host: str, port: int, last_words: Callable[[], None] = lambda: None, exit_code: int = 1):
        self._place = (host, port)
        self._last_words, self._exit_code = last_words, exit_code
        self._is_over = threading.Event()
        self._is_left = threading.Event()
        self._ending = threading.Lock()
        self.is_lost = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch during the block. Does nothing outside the main thread, which alone can be interrupted."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        # not SIGINT, which a shell gives to a program in the background as one to be ignored
        before = signal.signal(_SIGNAL, interrupt)
        thread = threading.Thread(target=self._watch, name="head", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._ending:  # after it no signal is sent, whose handler is gone
                self._is_over.set()
            signal.signal(_SIGNAL, before if before is not None else signal.SIG_DFL)

    def left(self) -> None:
        """Note that Ray was left: the process goes on by itself. Does not return if it is being ended already."""
        with self._ending:
            self._is_left.set()

    def answers(self) -> bool:
        """Return whether a connection to the head can be made."""
        try:
            socket.create_connection(self._place, LOST_S / 2).close()
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._is_over.wait(LOOK_S):
            if self.answers():
                answered = time.monotonic()
            elif time.monotonic() - answered >= LOST_S:
                with self._ending:
                    if self._is_over.is_set():
                        return
                    self.is_lost = True
                    signal.pthread_kill(threading.main_thread().ident, _SIGNAL)  # wakes it, if it waits
                self._end_unless_left()
                return

    def _end_unless_left(self) -> None:
        if self._is_left.wait(LEAVE_S):
            return
        with self._ending:  # never released
            if self._is_left.is_set():
                return
            try:
                self._last_words()
                sys.stdout.flush()
            finally:
                os._exit(self._exit_code)
