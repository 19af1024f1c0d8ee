"""The serial executor: all units in this process, one after another. For debugging, tests, and use without Ray."""

from __future__ import annotations

from harness.core.errors import InputsLost, StageFailure
from harness.executors import outcome
from harness.executors.events import Listener
from harness.executors.walk import Summary, Walk
from harness.stages.execution import execute_unit
from harness.stages.workplace import Workplace


def run(walk: Walk, workplace: Workplace, listen: Listener) -> Summary:
    """Do all units of the walk; Ctrl-C ends it after recording the finished units."""
    try:
        while (index := walk.take()) is not None:
            unit = walk.unit(index)
            listen("unit_started", {"unit": unit.name})
            try:
                execute_unit(
                    {key: walk.plan.stages[key] for key in unit.stages},
                    workplace,
                    lambda done, total: listen("stage_progress", {"done": done, "total": total}),
                )
            except InputsLost as lost:
                outcome.inputs_lost(walk, index, lost.keys, lost.messages, listen)
            except StageFailure as failure:
                outcome.failed(walk, index, str(failure), listen)
            else:
                outcome.done(walk, index, listen)
    except KeyboardInterrupt:
        return walk.summary(is_interrupted=True)
    return walk.summary()
