"""Standard streams as they come: closed, in a narrow encoding, or with a reader that has ended."""

from __future__ import annotations

import contextlib
import os
import sys


def prepare() -> None:
    """Make the streams ready for printing: closed ones swallow what is printed, unknown characters become "?".

    A closed descriptor must be taken: otherwise the next file that is opened would be standard output.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the rest of the program)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def silence() -> None:
    """Let standard output and error lead nowhere after their reader ended, also at the flush when Python exits."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
