"""A run that is killed on purpose when it keeps a state, and the series of kills that a method must survive."""

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
"""About how many kills after a state one series holds, spread evenly over the states of a run."""
Done = TypeVar("Done")


class Killed(BaseException):
    """Simulates the end of the process. No method may catch it."""


@dataclass
class Kills:
    """When to kill, and counters of what happened; the parts of a run share it."""

    before_saving: bool = False  # at the first state, before it is written
    after: int | None = None  # when so many states were written
    at_report: int | None = None  # at so many reports of progress
    saves: int = 0
    reports: int = 0


@dataclass
class KillableRun(Run):
    """A run that raises `Killed` as its `kills` ask, and counts."""

    kills: Kills = field(default_factory=Kills)

    def __post_init__(self) -> None:
        self.report = self._reported

    def _reported(self, done: int, total: int) -> None:
        self.kills.reports += 1
        if self.kills.reports == self.kills.at_report:
            raise Killed

    def save_state(self, step: int, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Keep the state as any run does, unless the run is killed before, or is killed right after."""
        if self.kills.before_saving:
            raise Killed
        super().save_state(step, tensors, numbers)
        self.kills.saves += 1
        if self.kills.saves == self.kills.after:
            raise Killed


def survive(do: Callable[[Path, Kills], Done], folder: Path, whole: Kills) -> Done | None:
    """Call `do` in one folder again and again, killed each time a little later; return the result of the last call.

    It is killed before the first state is written, then after states spread over the run (`whole` counted them in an
    undisturbed run). Where no state is kept, it is killed halfway by its reports of progress; where it reports nothing,
    it is done twice. None: it makes no progress, since it starts over each time.
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
    """Return the result of a call, or None when it was killed."""
    try:
        return do(folder, kills)
    except Killed:
        return None
