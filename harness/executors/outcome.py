"""What an executor does when a unit ends: the walk is updated, and listeners hear of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.core.errors import InputsLost, StageFailure
from harness.executors.events import Listener
from harness.executors.walk import Walk


def of(walk: Walk, index: int, do: Callable[[], object], listen: Listener) -> None:
    """Do a unit, and record how it ended."""
    try:
        do()
    except InputsLost as lost:
        inputs_lost(walk, index, lost.keys, lost.messages, listen)
    except StageFailure as failure:
        failed(walk, index, str(failure), listen)
    else:
        done(walk, index, listen)


def done(walk: Walk, index: int, listen: Listener, node: str = "") -> None:
    """Record that a unit is done; `node`: by which node of a cluster."""
    walk.finish(index)
    listen("unit_done", {"unit": walk.unit(index).name, **({"node": node} if node else {})})


def failed(walk: Walk, index: int, message: str, listen: Listener) -> None:
    """Record that a unit failed, and which units it blocks."""
    name = walk.unit(index).name
    blocked = walk.fail(index, message)
    listen("unit_failed", {"unit": name, "message": message})
    for other in blocked:
        listen("unit_blocked", {"unit": walk.unit(other).name, "by": name})


def inputs_lost(walk: Walk, index: int, keys: Sequence[str], messages: Sequence[str], listen: Listener) -> None:
    """Record that stages that a unit reads are damaged: they are made anew, then the unit; if not, it failed."""
    if walk.again(index, keys):
        listen("inputs_lost", {"unit": walk.unit(index).name, "messages": list(messages)})
    else:
        failed(walk, index, "; ".join(messages), listen)
