"""What is shown while files are fetched: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from harness.core.errors import one_line
from harness.core.fetched import Progress, format_size

if TYPE_CHECKING:
    from rich.console import Console

EVERY_S = 5.0
"""Seconds between two lines about one file."""
SMALL = 1_000_000
"""Bytes; files that are smaller are not worth a line."""


def progress() -> Progress:
    """Return what fits the output."""
    return Bar() if sys.stdout.isatty() else Lines()


class Lines:
    """A line every EVERY_S seconds, and when a file ends; none for small files that come at once."""

    def __init__(self):
        self.name, self.size, self.done = "", None, 0
        self.started = self.shown = 0.0
        self.at_start = 0

    def start(self, name: str, size: int | None, done: int = 0) -> None:
        """Begin a file."""
        self.name, self.size, self.done, self.at_start = name, size, done, done
        self.started = self.shown = time.monotonic()

    def advance(self, count: int) -> None:
        """Count bytes; show a line if it is time."""
        self.done += count
        now = time.monotonic()
        if now - self.shown >= EVERY_S:
            self.shown = now
            pace = max(self.done - self.at_start, 0) / (now - self.started)
            self.say(f"{self.name}: {self._so_far()}, {format_size(round(pace))}/s")

    def end(self) -> None:
        """Show what came of the file."""
        if self.done != self.at_start and (self.done >= SMALL or self.shown != self.started):
            self.say(f"{self.name}: {self._so_far()}")

    def say(self, line: str) -> None:
        """Print a line."""
        print(f"  {one_line(line, 500)}", flush=True)

    def _so_far(self) -> str:
        if self.size is None or self.done == self.size:
            return format_size(self.done)
        return f"{format_size(self.done)} of {format_size(self.size)}"


class Bar:
    """A bar with speed and remaining time."""

    def __init__(self, console: Console | None = None):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.bar = Progress(
            TextColumn("  {task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=console or Console(markup=False, emoji=False),
            transient=True,
        )  # fmt: skip
        self.task, self.name, self.received = None, "", 0

    def start(self, name: str, size: int | None, done: int = 0) -> None:
        """Begin a file."""
        self._close()
        self.name, self.received = name, 0
        self.bar.start()
        self.task = self.bar.add_task(one_line(name, 60), total=size, completed=done)

    def advance(self, count: int) -> None:
        """Move the bar."""
        self.received += count
        if self.task is not None:
            self.bar.advance(self.task, count)

    def end(self) -> None:
        """Replace the bar by a line."""
        self._close()
        if self.received >= SMALL:
            self.say(f"{self.name}: {format_size(self.received)}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(f"  {one_line(line, 500)}", highlight=False, soft_wrap=True)

    def _close(self) -> None:
        if self.task is not None:
            self.bar.refresh()
            self.bar.remove_task(self.task)
            self.bar.stop()
            self.task = None
