"""Events that executors report while they run, for display and for a file that programs read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]
"""Called with an event name (unit_started, stage_progress, unit_done, unit_failed, unit_blocked,
inputs_lost) and its data."""


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
