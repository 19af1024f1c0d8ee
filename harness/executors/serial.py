"""The serial executor: all units one after another. For debugging, tests, and use without Ray.

They are done in this process, unless the suite limits the time of a stage: a method that never returns can only be
ended with its process, so `resources.stage_timeout_s` gives the stages a process apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from harness.contracts.stage import to_json
from harness.core.identity import Stage
from harness.executors import outcome
from harness.executors.events import Listener
from harness.executors.keeper import Keeper
from harness.executors.walk import Summary, Walk
from harness.stages.execution import execute_unit
from harness.stages.workplace import Workplace


def run(walk: Walk, workplace: Workplace, listen: Listener) -> Summary:
    """Do all units of the walk; Ctrl-C ends it after recording the finished units."""
    with contextlib.ExitStack() as stack:
        do: Callable = execute_unit
        if workplace.stage_timeout_s is not None:
            keeper = Keeper()
            stack.callback(keeper.close)

            def do(stages: Mapping[str, Stage], *rest) -> None:
                keeper.do({key: to_json(stage) for key, stage in stages.items()}, *rest)

        return _walk(walk, workplace, listen, do)


def _walk(walk: Walk, workplace: Workplace, listen: Listener, do: Callable) -> Summary:
    def progressed(done: int, total: int) -> None:
        listen("stage_progress", {"done": done, "total": total})

    try:
        while (index := walk.take()) is not None:
            unit = walk.unit(index)
            listen("unit_started", {"unit": unit.name})
            stages = {key: walk.plan.stages[key] for key in unit.stages}
            outcome.of(walk, index, lambda stages=stages: do(stages, workplace, progressed), listen)
    except KeyboardInterrupt:
        return walk.summary(is_interrupted=True)
    return walk.summary()
