"""The display of progress: what is left is never less than nothing, also where units have one name."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

from rich.console import Console

from harness.executors import progress


def walk_of(works: list[tuple[str, float]]):
    """A walk with a unit of one stage for each (name, work)."""
    units = [SimpleNamespace(name=name, stages=[str(i)]) for i, (name, _) in enumerate(works)]
    stages = {str(i): SimpleNamespace(work=work) for i, (_, work) in enumerate(works)}
    return SimpleNamespace(
        missing=list(range(len(works))), unit=units.__getitem__, plan=SimpleNamespace(stages=stages), total=len(works),
        done=set(), failed=set(), blocked=set(),
    )  # fmt: skip


def test_units_of_one_name_are_each_counted_once(monkeypatch):
    """The estimate ends at 0 s; a unit that is done anew, after the last one, adds nothing."""
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    text = io.StringIO()
    shown = progress.Progress(
        walk_of([("distill", 100.0), ("distill", 5000.0), ("draw", 10.0)]), Console(file=text, width=200)
    )
    for name in ("distill", "draw", "distill", "draw"):
        shown("unit_done", {"unit": name})

    left = re.findall(r"about (-?\d+) s left", text.getvalue())
    assert [int(seconds) for seconds in left][-2:] == [0, 0]
