"""A full disk: recognised in exceptions and messages, so that a run stops at once and says so in one line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

WORDS = ("no space left on device", "disk quota exceeded", "os error 28)", "os error 122)")
"""What libraries write, lower case; safetensors and processes of a stage hand on the words alone."""
_NUMBERS = {errno.ENOSPC, errno.EDQUOT}


def is_full(error: BaseException | str) -> bool:
    """Return whether an exception, one that caused it, or a message says that a disk is full or a quota used up."""
    if isinstance(error, str):
        return any(words in error.lower() for words in WORDS)
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, OSError) and cause.errno in _NUMBERS or is_full(str(cause)):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False


@contextlib.contextmanager
def tolerated() -> Iterator[None]:
    """Skip the rest of the block when a disk is full: for notes that are worth less than going on."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
