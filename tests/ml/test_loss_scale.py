"""fp16: the scale of the loss, what is computed again, what is skipped and counted, and what fails."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from harness.model import loss_scale
from harness.model.loss_scale import LossScale, Overflow
from harness.training.loop import StepOver, train
from harness.training.weights import Level, LocalWeights

LARGE = 1e6
"""Not a number of fp16: a loss that has it overflows in the forward pass."""


def half(run):
    """Return a run that computes in fp16."""
    run.precision = "fp16"
    return run


class Line:
    """A model of one layer under autocast, and AdamW on it; the data of a step are set by hand."""

    def __init__(self, run, width: int = 8):
        torch.manual_seed(0)
        self.layer, self.run = nn.Linear(width, width), run
        self.names = [name for name, _ in self.layer.named_parameters()]
        level = Level(tuple(self.names), 1e-3)
        self.weights = LocalWeights(dict(self.layer.named_parameters()), {"all": level}, run)
        self.inputs = {}  # step -> factor of its input

    def loss(self, index: int, factor: float = 1.0):
        """Return the loss of a step: its sum of squares times a factor."""
        given = torch.randn(4, 8, generator=torch.Generator().manual_seed(index)) * self.inputs.get(index, 1.0)

        def part():
            with self.run.autocast():
                said = self.layer(given)
            return factor * said.float().square().mean()

        return [part]

    def step(self, index: int) -> dict[str, float]:
        """Take a step of AdamW."""
        loss = self.loss(index)
        self.weights.step("all", self.weights.gradient(loss, self.names))
        return {"loss": float(loss[0]().detach())}

    def values(self) -> dict[str, torch.Tensor]:
        """Return a copy of the weights."""
        return self.weights.read(self.names)


def train_line(line: Line, steps: int) -> None:
    """Train a line to so many steps."""
    train(line.run, StepOver(line.step, line.weights), steps, "a test")


def test_scale_is_that_of_torchs_grad_scaler(monkeypatch):
    """Fed with the same overflows, of which each is followed by the gradient that is computed again."""
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    torchs, ours = torch.amp.GradScaler("cpu", growth_interval=3), LossScale()
    scales = []
    for overflows in (True, False, False, False, True, True, False, False, False, False, False, True, False):
        answers = [math.inf, 1.0] if overflows else [1.0]
        for answer in answers:
            torchs.scale(weight.sum()).backward()
            weight.grad = torch.full_like(weight, answer)
            torchs.unscale_(optimizer)
            torchs.step(optimizer)
            torchs.update()
            optimizer.zero_grad()
        given = iter(answers)
        ours.gradient(lambda scale, given=given: ({"w": torch.tensor([next(given)])}, [torch.ones(1)]), bool)
        scales.append((torchs.get_scale(), ours.scale))

    assert [one for one, _ in scales] == [other for _, other in scales]
    assert {one for one, _ in scales} == {16384.0, 32768.0, 65536.0}  # up and down
    assert (ours.repeated, ours.skipped) == (4, 0)


def test_gradients_too_small_for_fp16_are_kept(make_run):
    """Those of a loss times 1e-7: nearly all are lost without a scale, and within fp16's rounding with one."""
    line, plain = Line(half(make_run())), Line(make_run())
    truth = plain.weights.gradient(plain.loss(0, 1e-7), plain.names)
    kept = line.weights.gradient(line.loss(0, 1e-7), line.names)
    line.run.loss_scale.scale = 1.0
    lost = line.weights.gradient(line.loss(0, 1e-7), line.names)

    def error(found):
        return max(float((found[n] - truth[n]).norm() / truth[n].norm()) for n in truth)

    assert error(kept) < 2**-9
    assert error(lost) > 0.5


def test_gradient_that_overflows_is_computed_again_at_a_smaller_scale(make_run):
    """To the same bits as at that scale from the start, with both passes in the ledger; no step is lost."""
    line, other = Line(half(make_run())), Line(half(make_run()))
    line.run.loss_scale.scale = loss_scale.LARGEST
    passes = []
    line.run.ledger.forward_passes = 0.0
    found = line.weights.gradient([lambda: passes.append(1) or line.loss(0)[0]()], line.names)
    other.run.loss_scale.scale = line.run.loss_scale.scale
    expected = other.weights.gradient(other.loss(0), other.names)

    assert line.run.loss_scale.repeated == len(passes) - 1 > 0
    assert line.run.loss_scale.scale == loss_scale.LARGEST / 2 ** (len(passes) - 1)
    assert all(torch.equal(found[n], expected[n]) for n in found)


def test_step_whose_forward_pass_overflows_is_skipped_and_counted(make_run):
    """Weights and moments are as if it had not been, and the scale is not to blame; a line says so."""
    line, without = Line(half(make_run(name="one"))), Line(half(make_run(name="other")))
    line.inputs[7] = LARGE
    said = []
    line.run.notify = said.append
    train_line(line, 20)
    for index in range(20):
        if index != 7:
            without.step(index)

    assert all(
        torch.equal(one, other) for one, other in zip(line.values().values(), without.values().values(), strict=True)
    )
    assert said == ["a test skipped 1 step of 20: not finite in fp16"]
    assert line.run.ledger.numbers["skipped_steps"] == 1
    assert line.run.ledger.numbers["repeated_gradients"] == 0
    assert line.run.ledger.numbers["loss_scale"] == loss_scale.START
    assert math.isfinite(line.run.ledger.numbers["loss"])


def test_training_that_skips_too_many_steps_fails_in_words(make_run):
    """As soon as it is sure: two of 20 are more than one in twenty."""
    line = Line(half(make_run()))
    line.inputs |= {3: LARGE, 5: LARGE}

    with pytest.raises(FloatingPointError, match="skipped 2 of its first 6 steps, more than 5% of 20.*bf16 or fp32"):
        train_line(line, 20)


def test_gradient_that_is_finite_at_no_scale_is_an_overflow_and_halves_the_scale_once(make_run):
    """A sum of finite numbers whose gradient fp16 cannot hold: the search for a scale leaves no trace in it."""
    line = Line(half(make_run()))
    scale = line.run.loss_scale
    answers = {"w": torch.tensor([math.nan])}

    with pytest.raises(Overflow, match="any scale"):
        scale.gradient(lambda factor: ({n: t.clone() for n, t in answers.items()}, [torch.ones(1)]), bool)
    assert (scale.scale, scale.clean) == (loss_scale.START / 2, 0)


def test_what_one_process_finds_all_do(make_run):
    """A gradient that is finite here and not in another process is computed again here too."""
    scale, asked = LossScale(), []

    def agree(flag: bool) -> bool:
        asked.append(flag)
        return len(asked) != 1 and flag  # the other one says no, once

    scale.gradient(lambda factor: ({"w": torch.ones(1)}, [torch.ones(1)]), agree)

    assert asked == [True, True, True]  # the gradient, its losses, the gradient again
    assert (scale.scale, scale.repeated) == (loss_scale.START / 2, 1)


def test_diverged_training_fails_in_fp16_too(make_run):
    """Weights that became large enough to overflow every pass."""
    line = Line(half(make_run()))
    with torch.no_grad():
        line.layer.weight.fill_(1e5)

    with pytest.raises(FloatingPointError, match="the training diverged"):
        train_line(line, 100)


@pytest.mark.parametrize("kill", [2, 5, 8])
def test_killed_training_goes_on_to_the_bit(make_run, monkeypatch, kill):
    """The scale, and how long it has held, are saved with the state: both changed before and after the kill."""
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)

    def of(name: str) -> Line:
        run = half(make_run(name=name))
        run.checkpoint_interval_s = 0.0
        line = Line(run)
        line.run.loss_scale.scale = loss_scale.LARGEST
        line.inputs[6] = LARGE
        return line

    whole, killed = of("whole"), of("killed")
    train_line(whole, 20)

    def report(done: int, total: int) -> None:
        if done == kill:
            raise KeyboardInterrupt

    killed.run.report = report
    with pytest.raises(KeyboardInterrupt):
        train_line(killed, 20)
    again = of("killed")
    again.run.loss_scale = LossScale()
    train_line(again, 20)

    assert all(torch.equal(whole.values()[n], again.values()[n]) for n in whole.names)
    assert again.run.loss_scale == whole.run.loss_scale
    counts = ("skipped_steps", "repeated_gradients", "loss_scale")
    assert [again.run.ledger.numbers[n] for n in counts] == [whole.run.ledger.numbers[n] for n in counts]
    assert whole.run.ledger.numbers["skipped_steps"] == 1 and whole.run.ledger.numbers["repeated_gradients"] > 1


def test_state_that_is_dropped_takes_its_scale_with_it(make_run):
    """The stage starts over, at the first scale."""
    run = half(make_run())
    run.checkpoint_interval_s = 0.0
    line = Line(run)
    run.loss_scale.scale = 2.0
    train_line(line, 3)
    assert run.load_state() is not None and run.loss_scale.scale == 2.0

    run.drop_state("a test")

    assert run.loss_scale == LossScale()
    assert run.load_state() is None


def test_parts_of_a_stage_have_a_scale_each_and_are_counted_together(make_run):
    """One training's overflow says nothing about another's weights."""
    run = half(make_run())
    for name in ("first", "second"):
        line = Line(run.part(name))
        line.run.loss_scale.scale = loss_scale.LARGEST
        line.inputs[4] = LARGE
        train_line(line, 20)

    assert run.ledger.numbers["skipped_steps"] == 2
    assert run.ledger.numbers["repeated_gradients"] > 2
    assert run.loss_scale == LossScale()


def test_nothing_is_scaled_in_other_precisions(make_run):
    """Not a bit and no number in the ledger; what is not finite fails its stage as ever."""
    line = Line(make_run())
    train_line(line, 3)

    assert not {"skipped_steps", "repeated_gradients", "loss_scale"} & line.run.ledger.numbers.keys()
    line.inputs[5] = math.inf
    with pytest.raises(FloatingPointError, match="a test's loss is"):
        train_line(line, 9)


@pytest.mark.parametrize("largest", [1e-15, 1e-9, 1.0, 1e9])
def test_curvature_keeps_vectors_of_any_size(make_run, largest):
    """H v is linear in v, which fp16 holds between 6e-8 and 65504 alone."""
    line, plain = Line(half(make_run())), Line(make_run())
    vector = {n: largest * torch.ones_like(v) for n, v in plain.values().items()}
    truth, found = (
        each.weights.curvature(each.loss(0), each.names, {n: v.clone() for n, v in vector.items()})
        for each in (plain, line)
    )

    assert all((found[n] - truth[n]).norm() < 2**-8 * truth[n].norm() for n in truth)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_slope_by_an_input_is_kept(factor):
    """Of a small number, and of one whose first scale overflows; a second call gives the same bits."""
    layer = nn.Linear(8, 8)
    given = torch.randn(4, 8)

    def norm(kind, by):
        with torch.autocast("cpu", dtype=torch.float16, enabled=kind == "fp16"):
            said = layer(by)
        return factor * said.float().norm()

    found, again, truth = (
        loss_scale.slope(norm(kind, by := given.clone().requires_grad_()), by, kind == "fp16")
        for kind in ("fp16", "fp16", "fp32")
    )

    assert (found - truth).norm() < 2**-8 * truth.norm()
    assert torch.equal(found, again)


def test_slope_that_fp16_cannot_hold_is_named():
    """NaN at every scale."""
    by = torch.ones(1, requires_grad=True)

    with pytest.raises(FloatingPointError, match="use precision: bf16 or fp32"):
        loss_scale.slope((by * math.nan).sum(), by, True)
