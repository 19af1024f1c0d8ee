"""The loop of all training stages: saves state, resumes after a kill, reports progress, detects divergence.

A step queues work for the device, and its numbers stay there: reading one makes the host wait until the device has done
all that is queued, and then the queue is empty. The numbers of up to `READ_EVERY` steps are read together, and before
anything that others see: a stop, a saved state, the end. So a value that is not finite is found a few steps late, but
never used, and named with the step that it is of.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from harness.core.counted import counted
from harness.model.loss_scale import MOST_SKIPPED, Overflow
from harness.model.run import Run
from harness.model.saved_state import UnfitState
from harness.model.transfer import on_host

READ_EVERY = 10
"""Steps whose numbers are read from the device together."""


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

    def step(self, index: int) -> Mapping[str, float | Tensor]:
        """Take one step; return the numbers to log, by name. Random draws must depend only on the index.

        Numbers that were computed on a device are returned as tensors of one element, which the loop reads later.
        """


@dataclass(frozen=True)
class StepOver:
    """A `Learner` made of a step function and an object that holds all state that the function changes."""

    step: Callable[[int], Mapping[str, float | Tensor]]
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
    naming `what` and the step, when a number is not finite; up to `READ_EVERY` further steps may have been taken. In
    fp16 a step whose gradient overflows is skipped from there on, so a step that changes anything before its last
    gradient leaves it in order; the ledger counts skipped steps, and too many of them raise FloatingPointError.
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
    numbers, note = _Numbers(run, what, last), _noting(run)
    for index in range(start, steps):
        done, is_end = index + 1, index + 1 == steps
        with run.ledger.phase("train"):
            try:
                numbers.add(index, _step(run, learner, index, steps, what))
            except Exception:
                with contextlib.suppress(RuntimeError):  # a device that does not answer: the first error is the cause
                    numbers.read(together=False)  # what went wrong may follow from a value that was not finite before
                raise
            if done % READ_EVERY == 0 or done in stops or is_end:
                numbers.read()
        run.report(done, steps)
        note(last)
        if done in stops:
            yield done
        if run.is_checkpoint_due() or (is_end and run.keeps_end):
            with run.ledger.phase("train"):
                numbers.read()
            with run.ledger.phase("save"):
                run.save_state(done, learner.state(), last)
    note(last)
    skipped = run.loss_scale.skipped
    if skipped and run.world.rank == 0:
        run.notify(f"{what} skipped {counted(skipped, 'step')} of {steps}: not finite in fp16")


@dataclass
class _Numbers:
    """The numbers of steps, as they were returned until they are read."""

    run: Run
    what: str
    last: dict[str, float]  # the last value of each that was read
    _waiting: list[tuple[int, str, float | Tensor]] = field(default_factory=list)

    def add(self, index: int, numbers: Mapping[str, float | Tensor]) -> None:
        """Keep the numbers of a step, as they are now and without a graph."""
        for name, value in numbers.items():
            self._waiting.append((index, name, value.detach().clone() if isinstance(value, Tensor) else float(value)))

    def read(self, *, together: bool = True) -> None:
        """Read what is kept, and track it; values are means over processes, or without `together` those of this one.

        Raises FloatingPointError for the first value that is not finite.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        for (index, name, _), own in zip(waiting, on_host([value for *_, value in waiting]), strict=True):
            value = self.run.world.mean(own) if together else own
            self.last[name] = value
            if not math.isfinite(value):
                raise FloatingPointError(f"{self.what}'s {name} is {value} at step {index}: the training diverged")
            self.run.track(name, value, index)


def _step(run: Run, learner: Learner, index: int, steps: int, what: str) -> Mapping[str, float | Tensor]:
    """Take a step; return its numbers, none if it is skipped. Raises FloatingPointError if too many are."""
    try:
        return learner.step(index)
    except Overflow as overflow:
        run.loss_scale.skipped += 1
        skipped = run.loss_scale.skipped
        if skipped > MOST_SKIPPED * steps:
            raise FloatingPointError(
                f"{what} skipped {skipped} of its first {index + 1} steps, more than {MOST_SKIPPED:.0%} of {steps}: "
                f"{overflow}; the training diverged (lower learning_rate), or needs precision: bf16 or fp32"
            ) from overflow
        return {}


def _noting(run: Run) -> Callable[[Mapping[str, float]], None]:
    """Return a function that puts a learner's numbers into the ledger, in fp16 with what the loss scale cost.

    What earlier trainings of the stage skipped is added.
    """
    numbers, scale = run.ledger.numbers, run.loss_scale
    counts = ("skipped_steps", "repeated_gradients")
    earlier = {name: numbers.get(name, 0) for name in counts}

    def note(last: Mapping[str, float]) -> None:
        numbers.update(last)
        if run.scales_loss:
            own = scale.skipped + last.get("skipped_steps", 0), scale.repeated
            numbers.update({name: earlier[name] + count for name, count in zip(counts, own, strict=True)})
            numbers["loss_scale"] = scale.scale

    return note
