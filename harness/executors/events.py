"""Events that executors report while they run, for display and for a file that programs read."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.stages import notices

Listener = Callable[[str, dict[str, Any]], None]
"""Called with an event name (unit_started, stage_progress, notice, unit_done, unit_failed, unit_blocked, inputs_lost)
and its data."""
NOTICE_INTERVAL_S = 0.5


@contextlib.contextmanager
def with_notices(run_folder: Path, listen: Listener) -> Iterator[None]:
    """Report the lines that stages leave for the user during the block (event "notice"), from a thread."""
    is_over = threading.Event()

    def follow() -> None:
        is_last = False
        while not is_last:
            is_last = is_over.wait(NOTICE_INTERVAL_S)
            with contextlib.suppress(OSError):  # a full disk is reported by whatever needs it
                for message in notices.take(run_folder):
                    listen("notice", {"message": message})

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class EventLog:
    """events.jsonl: one JSON object per line, for programs."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        if event == "stage_progress":
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "event": event, **data}) + "\n")
