"""The public face of ImmunityBench: `run`, `plan` and `load` for notebooks, and the names that plug-ins import.

In a notebook::

    from harness import api

    results = api.run("quickstart", seeds=3, runs="my_runs")
    results.leaderboard.query("metric == 'clip_image' and valid")
    results.compare("imma", "none")

In a plug-in::

    from harness.api import Defense, Protection, ThreatModel, register

Importing this module imports neither torch nor pandas.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.contracts.attack import Attack, AttackedConcept, Budget, Checkpoint, NewWord, UsualBudget
from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.detector import Detector, Seen
from harness.contracts.diagnostic import Diagnostic, MeasuredRun, PageSection, ReleasedModel
from harness.contracts.hooks import AdaptationHook, Batch, HookSpec, SamplingHook
from harness.contracts.metric import Metric
from harness.contracts.protection import Protection, ThreatModel
from harness.contracts.stage import StageKind, StageWork
from harness.contracts.state import ModelState
from harness.contracts.table import Figure, Section, Table
from harness.contracts.task import Build, Input, Measurement, Stage, Task, TaskSpec
from harness.core.described import optional
from harness.core.errors import ExitCode, UserMistake, one_line
from harness.core.hub import HubModel
from harness.core.registry import register
from harness.core.sampling import Sampling
from harness.core.search import Choice, Range, Space
from harness.core.web_file import WebFile

if TYPE_CHECKING:
    from rich.console import Console

    from harness.plan.graph import Plan
    from harness.results.loaded_run import LoadedRun

__all__ = [
    "AdaptationHook", "Attack", "AttackedConcept", "Batch", "Budget", "Build", "Checkpoint", "Choice", "Defense",
    "Detector", "Diagnostic", "Figure", "HookSpec", "HubModel", "Input", "MeasuredRun", "Measurement", "Metric",
    "ModelState", "NewWord", "PageSection", "ProtectedConcept", "Protection", "Range", "ReleasedModel", "Sampling",
    "SamplingHook", "Section", "Seen", "Space", "Stage", "StageKind", "StageWork", "Table", "Task", "TaskSpec",
    "ThreatModel", "UserMistake", "UsualBudget", "WebFile", "load", "optional", "plan", "register", "run",
]  # fmt: skip


def run(
    suite: str | Path,
    *,
    executor: Literal["ray", "serial"] = "ray",
    cache: Literal["always", "never", "only-missing", "only-cached", "stale=redo"] = "only-missing",
    runs: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    ray_address: str | None = None,
    store: str | None = None,
    console: Console | None = None,
    **overrides: Any,
) -> LoadedRun:
    """Run the missing stages of a suite, write its tables, and return the results, as `python -m harness run` does.

    `suite` is a file, the name of a bundled suite, the folder of a run, or a run's name. `runs` is the results folder;
    None: that of the run that is named, else "runs". `overrides` replace values of the suite: run(..., seeds=3); a
    nested one is named by its path: run(..., **{"attacks.0.steps": [10, 20]}). `store` is the URL of a store that
    machines share, as `--store`; None: that which the results folder remembers. `console` shows the progress; None:
    standard output. Trials that failed do not raise: they are the `failures` of the results, and printed.

    Raises UserMistake for everything that is wrong in the suite, before any compute; KeyboardInterrupt when it was
    interrupted, OSError when a disk is full: what is finished is kept, and the same call continues.
    """
    from harness.commands import arguments, running
    from harness.commands.opened import open_suite
    from harness.commands.run import CACHE_MODES, EXECUTORS

    _check_choice("executor", executor, EXECUTORS)
    _check_choice("cache", cache, CACHE_MODES)
    given = [str(path) for path in plugins]
    opened = open_suite(str(suite), assignments(overrides), plugins=given, runs=_text(runs), store=store)
    options = running.RunOptions(executor, cache, ray_address=ray_address)
    code = running.run(opened, options, console or arguments.console())
    if code is ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code is ExitCode.DISK_FULL:
        raise OSError(errno.ENOSPC, "no space left; free some, and the same call continues", str(opened.folder))
    return load(opened.folder)


def plan(
    suite: str | Path, *, runs: str | Path | None = None, plugins: Sequence[str | Path] = (), **overrides: Any
) -> Plan:
    """Return the stages, units and measurements of a suite; nothing is computed or written. Arguments as in `run`."""
    from harness.commands.opened import open_suite
    from harness.store import opening

    given = [str(path) for path in plugins]
    return open_suite(str(suite), assignments(overrides), plugins=given, runs=_text(runs), store=opening.NONE).plan


def load(folder: str | Path) -> LoadedRun:
    """Return the results in the folder of a run, such as "runs/quickstart". Raises UserMistake where there is none."""
    from harness.results.loaded_run import LoadedRun

    return LoadedRun(Path(folder))


def assignments(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as `--set` takes them. Raises UserMistake for a value that no suite can hold."""
    lines = []
    for key, value in overrides.items():
        try:
            lines.append(f"{key}={json.dumps(value, allow_nan=False)}")
        except (TypeError, ValueError):
            what = "a suite holds text, numbers, lists and mappings"
            raise UserMistake(f"{one_line(key, 80)}: {one_line(repr(value), 80)}: {what}") from None
    return lines


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise UserMistake for a value that is not allowed."""
    if value not in allowed:
        raise UserMistake(f"{name}: {one_line(repr(value), 60)} is none of {', '.join(allowed)}")
