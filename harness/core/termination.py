"""SIGTERM ends a program as Ctrl-C does: what is finished is kept, tables are written, and the exit code is 130."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on SIGTERM inside the block; another handler is put back afterwards.

    Does nothing in other threads, where Python has no signal handlers, and where SIGTERM is ignored.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        # None: a handler that was not set from Python cannot be put back
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
