"""The training loop reads numbers of several steps together, and nothing is done with what was not read."""

from __future__ import annotations

import math

import pytest
import torch

from harness.training.loop import READ_EVERY, StepOver, train, trajectory


class Nothing:
    """A state without tensors."""

    def state(self):
        return {}

    def load_state(self, state):
        pass


class Line:
    """Steps that return their index as a number of a device; some return NaN, one may raise."""

    def __init__(self, run, *, nan_at: int = -1, raises_at: int = -1):
        self.run, self.nan_at, self.raises_at = run, nan_at, raises_at
        self.taken = 0
        self.read: list[tuple[float, int, int]] = []  # value, its step, steps that were taken when it was read
        self.value = torch.zeros(())
        run.track = lambda name, value, step: self.read.append((value, step, self.taken))

    def step(self, index: int):
        if index == self.raises_at:
            raise ValueError("a hook must weigh by finite numbers")
        self.taken += 1
        return {"loss": self.value.fill_(math.nan if index == self.nan_at else index)}

    def train(self, steps: int):
        train(self.run, StepOver(self.step, Nothing()), steps, "the test")
        return self


@pytest.fixture
def run(make_run):
    """A run that saves no state."""
    made = make_run()
    made.checkpoint_interval_s = math.inf
    return made


def test_numbers_are_read_every_few_steps_and_at_the_end(run):
    """Each with its own step, as it was when the step returned it: the tensor was changed since."""
    steps = 2 * READ_EVERY + 3
    line = Line(run).train(steps)

    when = [min(READ_EVERY * (1 + step // READ_EVERY), steps) for step in range(steps)]
    assert line.read == [(float(step), step, when[step]) for step in range(steps)]
    assert run.ledger.numbers["loss"] == steps - 1


def test_numbers_are_read_before_a_stop(run):
    """The caller of the loop saves the weights there."""
    line = Line(run)
    for done in trajectory(run, StepOver(line.step, Nothing()), [3, 5], "the test"):
        assert [step for _, step, _ in line.read] == list(range(done))
        assert run.ledger.numbers["loss"] == done - 1


def test_a_value_that_is_not_finite_is_named_with_its_own_step(run):
    """A few steps late; the steps before it are tracked."""
    line = Line(run, nan_at=2)

    with pytest.raises(FloatingPointError, match=r"^the test's loss is nan at step 2: the training diverged$"):
        line.train(3 * READ_EVERY)
    assert [step for _, step, _ in line.read] == [0, 1]
    assert line.taken == READ_EVERY


def test_no_state_is_saved_after_a_value_that_is_not_finite(run):
    """With a state after each step, the last one is of the step before."""
    run.checkpoint_interval_s = 0.0
    with pytest.raises(FloatingPointError, match="at step 2"):
        Line(run, nan_at=2).train(3 * READ_EVERY)

    assert run.saved_step() == 2


def test_no_stop_is_reached_after_a_value_that_is_not_finite(run):
    """What diverged is not saved as a checkpoint."""
    line = Line(run, nan_at=3)
    reached = []

    with pytest.raises(FloatingPointError, match="at step 3"):
        reached.extend(trajectory(run, StepOver(line.step, Nothing()), [2, 4, 6], "the test"))
    assert reached == [2]


def test_an_error_that_follows_from_a_value_that_is_not_finite_names_the_value(run):
    """Its own words would name what is not the cause; an error of its own is shown as it is."""
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        Line(run, nan_at=1, raises_at=3).train(READ_EVERY)
    with pytest.raises(ValueError, match="finite numbers"):
        Line(run, raises_at=3).train(READ_EVERY)
