"""The loop of all training stages: saves state, resumes after a kill, reports progress, detects divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from harness.model.run import Run
from harness.model.saved_state import UnfitState

if TYPE_CHECKING:
    from torch import Tensor


class Stateful(Protocol):
    """An object whose state can be saved and restored exactly, such as `Weights` with their optimizers."""

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to resume, as whole tensors; every process calls it, the first one's result counts.

        Nothing in it depends on the number of processes or on what they partition.
        """

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned in the first process, under this or another way of spreading.

        Raises UnfitState, before anything is changed, if it does not fit.
        """


class Learner(Stateful, Protocol):
    """The interface that the training loop needs."""

    def step(self, index: int) -> Mapping[str, float]:
        """Take one step; return the numbers to log, by name. Random draws must depend only on the index."""


@dataclass(frozen=True)
class StepOver:
    """A `Learner` made of a step function and an object that holds all state that the function changes."""

    step: Callable[[int], Mapping[str, float]]
    moved: Stateful

    def state(self) -> dict[str, Tensor]:
        """Return the state of that object."""
        return self.moved.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.moved.load_state(state)


def train(run: Run, learner: Learner, steps: int, what: str) -> None:
    """Take the remaining steps of `learner`.

    Only the learner's state is saved. The last value of each number goes to the ledger. Raises FloatingPointError,
    naming `what`, when a number is not finite.
    """
    for _ in trajectory(run, learner, [steps], what):
        pass


def trajectory(run: Run, learner: Learner, stops: Sequence[int], what: str) -> Iterator[int]:
    """Train as `train` does up to the last of `stops`; yield each stop when that many steps are done.

    State is saved after the caller handled a stop, so a resumed run finds what the caller saved there. Stops before
    the resumed state are not yielded again.
    """
    last: dict[str, float] = {}
    start, steps = 0, stops[-1]
    kept = run.load_state()
    if kept is not None:
        try:
            learner.load_state(kept[1])
        except UnfitState as error:  # in every process, as all read the same state
            run.drop_state(f"it does not fit {what}: {error}")
        else:
            start, last = kept[0], kept[2]
        kept = None  # closes the file
    for index in range(start, steps):
        with run.ledger.phase("train"):
            for name, value in learner.step(index).items():
                last[name] = run.world.mean(float(value))
                if not math.isfinite(last[name]):
                    raise FloatingPointError(f"{what}'s {name} is {last[name]} at step {index}: the training diverged")
                run.track(name, last[name], index)
        run.report(index + 1, steps)
        run.ledger.numbers.update(last)
        if index + 1 in stops:
            yield index + 1
        if run.is_checkpoint_due() or (index + 1 == steps and run.keeps_end):
            with run.ledger.phase("save"):
                run.save_state(index + 1, learner.state(), last)
    run.ledger.numbers.update(last)
