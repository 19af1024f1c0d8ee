"""Push to the objects of a store what is in the results folder alone: left by a failing network, or by older runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from harness.commands import arguments
from harness.commands.opened import Opened
from harness.core import registry
from harness.core.counted import counted
from harness.store.object_words import StoreProblem

if TYPE_CHECKING:
    from rich.console import Console


def push_left(opened: Opened, keys: Collection[str], console: Console) -> None:
    """Push those of these committed stages that are here alone. Raises StoreProblem."""
    if opened.store.url is None or not keys:
        return
    stages = [(opened.plan.stages[key].kind, key) for key in opened.plan.stages if key in keys]
    spares = {kind: spare for kind, _ in stages if (spare := registry.get("stage", kind).spare) is not None}
    pushed, damaged = opened.store.push_left(stages, spares)
    if pushed:
        _print(console, f"pushed {counted(pushed, 'stage')} to {opened.store.url}, which had them not")
    for line in damaged:
        arguments.warn(f"not pushed: {line}")


def push_at_end(opened: Opened, console: Console) -> bool:
    """Push what could not be pushed during a run; say what cannot be now, and return False then."""
    try:
        push_left(opened, opened.committed(), console)
    except StoreProblem as problem:
        _print(
            console,
            f"{problem}; what is finished and could not be pushed is kept in {opened.store.root}, and the same command "
            "pushes it",
            style="red",
        )
        return False
    return True


def _print(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
