"""A run that is killed on purpose when it saves a state, and the series of kills that a method must survive."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness.model.run import Run

if TYPE_CHECKING:
    import torch

RESTARTS = 6
"""Approximate number of kills after a state in one series, spread evenly over the states of a run."""
Done = TypeVar("Done")


class Killed(BaseException):
    """Simulates the end of the process. No method may catch it."""


@dataclass
class Kills:
    """When to kill, and counts of saves and reports; shared by the parts of a run."""

    before_saving: bool = False  # at the first state, before it is written
    after: int | None = None  # after this number of written states
    at_report: int | None = None  # at this number of progress reports
    saves: int = 0
    reports: int = 0


@dataclass
class KillableRun(Run):
    """A run that raises `Killed` as set by its `kills`, and counts saves and reports."""

    kills: Kills = field(default_factory=Kills)

    def __post_init__(self) -> None:
        self.report = self._reported

    def _reported(self, done: int, total: int) -> None:
        self.kills.reports += 1
        if self.kills.reports == self.kills.at_report:
            raise Killed

    def save_state(self, step: int, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Save the state like any run; the run may be killed just before or just after."""
        if self.kills.before_saving:
            raise Killed
        super().save_state(step, tensors, numbers)
        self.kills.saves += 1
        if self.kills.saves == self.kills.after:
            raise Killed


def survive(do: Callable[[Path, Kills], Done], folder: Path, whole: Kills) -> Done | None:
    """Call `do` repeatedly in one folder, killed a little later each time; return the last call's result.

    It is killed before the first state is written, then after states spread over the run; `whole` has their number from
    an undisturbed run. Without states it is killed halfway by its reports; without reports it is done twice. None: it
    makes no progress, since it starts over each time.
    """
    if not whole.saves:
        halfway = Kills(at_report=math.ceil(whole.reports / 2)) if whole.reports else Kills()
        _killed(do, folder, halfway)
        return do(folder, Kills())
    _killed(do, folder, Kills(before_saving=True))
    stride = math.ceil(whole.saves / RESTARTS)
    for _ in range(whole.saves // stride + 1):
        done = _killed(do, folder, Kills(after=stride))
        if done is not None:
            return done
    return None


def _killed(do: Callable[[Path, Kills], Done], folder: Path, kills: Kills) -> Done | None:
    """Return the result of a call, or None if it was killed."""
    try:
        return do(folder, kills)
    except Killed:
        return None
