"""Locks that several processes keep, also on several machines where the file system carries `flock` between them.

A lock is a file. The kernel frees it when its process ends, however it ends. The file is removed with the lock, so a
process that waited for it must check that it holds the file that has the name now.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path` for this process; a second process waits here."""
    descriptor = _acquire(path, waits=True)
    try:
        yield
    finally:
        _release(path, descriptor)


@contextlib.contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """Hold the lock `path` if it is free; yield whether it was."""
    descriptor = _acquire(path, waits=False)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def _acquire(path: Path, *, waits: bool) -> int | None:
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # the holder before us removed it
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)  # before the lock is free: otherwise it could be another process' file
    os.close(descriptor)


def is_older(folder: Path, days: float) -> bool:
    """Return whether nothing in a folder, at any depth, was written for so many days."""
    newest = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            newest = max(newest, path.stat().st_mtime)
    return time.time() - newest > days * 86400
