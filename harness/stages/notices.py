"""Lines for the user from processes that do stages, which have no console: a file each in the run's folder.

The process that shows the run takes and shows them. It works for all executors, and on several machines that share the
folder. A line that was not shown before a kill is shown by the next run.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from pathlib import Path

from harness.core.files import write_json

FOLDER = "notices"


def say(run_folder: Path, text: str) -> None:
    """Leave one line for the user."""
    folder = run_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json", {"message": text})


def take(run_folder: Path) -> list[str]:
    """Return the lines that were left, oldest first, and delete them."""
    found = []
    for path in sorted((run_folder / FOLDER).glob("[0-9]*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(str(json.loads(path.read_text(encoding="utf-8"))["message"]))
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        (run_folder / FOLDER).rmdir()  # succeeds once it is empty
    return found
