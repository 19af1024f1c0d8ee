"""Progress display: on a terminal a bar with the remaining time, otherwise a line per unit."""

from __future__ import annotations

import time
from typing import Any

from harness.core import disk
from harness.executors.walk import Walk


class Progress:
    """A listener that shows the progress of the walk. The estimate weights units by their UNet passes."""

    def __init__(self, walk: Walk, console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.walk = walk
        self.console = console
        self.started = time.monotonic()
        self.total_work = sum(self._work(i) for i in walk.missing)
        self.done_work = 0.0
        self.first_done: tuple[float, float] | None = None  # (time, work done until then)
        self.work_by_name: dict[str, list[float]] = {}  # units may have one name: theirs are counted in any order
        for index in walk.missing:
            self.work_by_name.setdefault(walk.unit(index).name, []).append(self._work(index))
        self.bar = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[eta]}"),
                console=console,
            )  # fmt: skip
            self.task = self.bar.add_task("starting", total=walk.total, eta="")

    def _work(self, index: int) -> float:
        """Return the weight of a unit: its passes, plus the cost of starting and scoring in units of passes."""
        return 200.0 + sum(self.walk.plan.stages[k].work for k in self.walk.unit(index).stages)

    def _count(self, unit: str) -> None:
        """Count a unit's work as done, once for each missing unit of that name."""
        known = self.work_by_name.get(unit)
        if known:
            self.done_work += known.pop()

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            self.bar.stop()

    def _eta(self) -> str:
        now = time.monotonic()
        gone = f"{format_seconds(now - self.started)} gone"
        if self.first_done is None or (since := now - self.first_done[0]) < 5:
            return gone
        speed = (self.done_work - self.first_done[1]) / since  # without the first unit, which includes worker startup
        if speed <= 0:
            return gone
        return f"{gone}, about {format_seconds((self.total_work - self.done_work) / speed)} left"

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        finished = len(self.walk.done) + len(self.walk.failed) + len(self.walk.blocked)
        if event == "unit_started" and self.bar:
            self.bar.update(self.task, description=data["unit"][:60], eta=self._eta())
        elif event == "stage_progress" and self.bar:
            self.bar.update(self.task, eta=f"step {data['done']} of {data['total']}; {self._eta()}")
        elif event == "unit_done":
            self._count(data["unit"])
            self.first_done = self.first_done or (time.monotonic(), self.done_work)
            if self.bar:
                self.bar.update(self.task, completed=finished, eta=self._eta())
            else:
                self.console.print(
                    f"[{finished}/{self.walk.total}] {data['unit']}  ({self._eta()})", markup=False, highlight=False
                )
        elif event == "inputs_lost":
            for message in data["messages"]:
                self.console.print(f"made anew: {message}", style="yellow", markup=False, highlight=False)
            if self.bar:
                self.bar.update(self.task, total=self.walk.total)
        elif event == "notice":
            self.console.print(f"note: {data['message']}", markup=False, highlight=False, soft_wrap=True)
        elif event == "unit_failed":
            self._count(data["unit"])
            if not disk.is_full(data["message"]):  # which ends the run, and is said once, at its end
                self.console.print(f"failed: {data['message']}", style="red", markup=False, highlight=False)


def format_seconds(seconds: float) -> str:
    """Return a readable duration: 42 s, 3 min 5 s, 2 h 10 min, 3 days."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds / 86400:.0f} days"
