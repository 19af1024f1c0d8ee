"""The folder in which an executor keeps what it needs while it runs, inside the run's folder, which machines share.

Its name holds machine and process, and beside it is a lock that its owner holds. What a dead process left is removed by
the next start; what another run uses is not touched, wherever that runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from harness.core.locks import is_older, locked, try_locked
from harness.core.machine import host

_NAME = re.compile(r"\.ray-([0-9a-f]{8})-\d+-[0-9a-f]{8}")
FOREIGN_DAYS = 7
"""A folder of another machine whose lock looks free is removed after so many days: its file system may hold locks for
one machine only."""


@contextlib.contextmanager
def own_scratch(run_folder: Path) -> Iterator[Path]:
    """Make the folder for this process, after removing those of dead ones; remove it when the block ends."""
    run_folder.mkdir(parents=True, exist_ok=True)
    sweep(run_folder)
    folder = run_folder / f".ray-{host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with locked(_lock_of(folder)):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(run_folder: Path) -> None:
    """Remove the folders of processes that are gone."""
    for folder in run_folder.glob(".ray-*"):
        name = _NAME.fullmatch(folder.name)
        if name is None or not folder.is_dir():
            continue
        with try_locked(_lock_of(folder)) as is_free:
            if is_free and (name[1] == host() or is_older(folder, FOREIGN_DAYS)):
                shutil.rmtree(folder, ignore_errors=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
