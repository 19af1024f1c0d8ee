"""User mistakes, and the exit codes of the program.

A user mistake is reported in one line (where, what, what to do), without a traceback. Any other exception is a defect
of the program or of a method and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """What the program returns to the shell."""

    DONE = 0
    TRIALS_FAILED = 1
    USER_MISTAKE = 2
    RUNNING = 3  # of `status` only, like the next
    UNFINISHED = 4
    INTERRUPTED = 130


class UserMistake(Exception):
    """One or several mistakes in the user's input, each as one line: where, what and what to do."""

    def __init__(self, messages: str | Sequence[str]):
        self.messages: list[str] = [messages] if isinstance(messages, str) else list(messages)
        super().__init__("\n".join(self.messages))

    def __reduce__(self):  # keeps the messages when pickled for another process
        return (type(self), (self.messages,))


class StageFailure(Exception):
    """A stage failed; its record is in the run's failures folder and the other stages continue."""


class InputsLost(Exception):
    """Committed stages that a unit reads were damaged, and were set aside: they must be made anew, then the unit."""

    def __init__(self, keys: Sequence[str], messages: Sequence[str]):
        super().__init__("; ".join(messages))
        self.keys, self.messages = tuple(keys), tuple(messages)

    def __reduce__(self):
        return (type(self), (self.keys, self.messages))


def one_line(text: object, limit: int = 160) -> str:
    """Return `text` on one line, control characters escaped and cut at `limit` characters."""
    flat = " ".join(str(text).split())
    flat = "".join(c if c.isprintable() else repr(c)[1:-1] for c in flat)
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest allowed name, else the list of allowed names."""
    names = sorted(set(allowed))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""
