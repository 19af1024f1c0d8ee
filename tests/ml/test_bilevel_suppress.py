"""Bilevel fine-tuning: both profiles against plain loops of twenty steps, what is saved, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch

from defenses.pruning.bilevel import BilevelSuppress, Parameters
from defenses.pruning.distill import Distill
from defenses.pruning.suppress import Suppress
from harness.core import parameters
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from harness.training import diffusion
from harness.training.general_pairs import GeneralPairs
from tests import tiny
from tests.ml.students import adamw, apart, concepts, lent, lower_loss, stepped, student_of, upper_loss

RELEASED = Parameters(
    steps=20, lower_steps=5, batch_size=4, lower_learning_rate=2e-4, upper_learning_rate=4e-4, warmup_steps=3
)
PAPER = dataclasses.replace(RELEASED, profile="paper", lower_steps=4, warmup_steps=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source of a tiny model that predicts velocity."""
    folder = tmp_path_factory.mktemp("velocity")
    tiny.save_pipeline(folder / "model", prediction_type="v_prediction")
    torch.set_num_threads(1)
    return resolve_model(ModelSpec(id=str(folder / "model")), "test", folder)


@pytest.fixture
def targets(tiny_folder):
    """Two concepts."""
    return concepts(tiny_folder)


@pytest.fixture
def lend(source, tiny_folder, make_run):
    """Return a function that makes a run with teacher and pairs."""
    files = tuple(sorted((tiny_folder / "purse").glob("*.png")))
    return lambda name="work": lent(make_run(1, name), source, files)


class _Plain:
    """What a plain loop reads: the same draws, and both losses written out."""

    def __init__(self, model, run, targets):
        self.scheduler, self.teacher = model.noise_scheduler(), copy.deepcopy(run.teacher.unet)
        images, captions = ([x for t in targets for x in getattr(t, name)] for name in ("images", "captions"))
        self.encoded = diffusion.encode_images(model, run, images, captions, flip=True)
        self.nothing = model.encode_text([""])
        self.pairs = GeneralPairs(model, run, run.pairs, batch_size=4, flip=True, seed=run.seed_for("lower"))
        self.seed = run.seed_for("upper")

    def lower(self, unet, step):
        return lower_loss(unet, self.teacher, self.scheduler, self.pairs.batch(step))

    def upper(self, unet, step):
        batch = diffusion.draw(self.encoded, 4, 1000, seed=self.seed, step=step, device="cpu")
        return upper_loss(unet, self.teacher, self.scheduler, batch, self.nothing)


def _trained(model, run, p, targets):
    """Return what is released, and what was tracked: name -> values."""
    seen: dict[str, list[float]] = {}
    run.track = lambda name, value, step: seen.setdefault(name, []).append(value)
    return BilevelSuppress(p).protect(model, targets, [], run).tensors, seen


def test_the_released_schedule_is_that_of_a_plain_loop(source, lend, targets):
    """Twenty lower steps with an upper one after each five; two AdamW and two schedules, each by its own steps."""
    run, model = lend(), student_of(source)
    plain = copy.deepcopy(model.unet).requires_grad_(True)
    reading = _Plain(model, lend("plain"), targets)
    released, seen = _trained(model, run, RELEASED, targets)
    low, up = adamw(plain, 2e-4, warmup=3), adamw(plain, 4e-4, warmup=3)
    lower, upper = [], []
    for step in range(20):
        lower.append(stepped(*low, reading.lower(plain, step)))
        if (step + 1) % 5 == 0:
            upper.append(stepped(*up, reading.upper(plain, step // 5)))

    print(f"weights differ by {apart(released, plain):.1e}")
    assert seen["lower_loss"] == pytest.approx(lower, rel=1e-6)
    assert seen["upper_loss"] == pytest.approx(upper, rel=1e-6)
    assert apart(released, plain) < 1e-6
    numbers = run.ledger.numbers
    assert (numbers["general_samples"], numbers["concept_samples"]) == (80, 16)
    assert numbers["trainable_parameters"] == sum(p.numel() for p in plain.parameters())
    # teacher and student at 80 general images; two passes of the teacher and one of the student at 16 of the concepts
    assert (run.ledger.forward_passes, run.ledger.backward_passes) == (2 * 80 + 3 * 16, 80 + 16)


def test_the_penalty_form_is_that_of_a_plain_loop(source, lend, targets):
    """Four rounds of four steps on a second student, and one on the first with the gradient of L_up + 100 L_low."""
    run, model = lend(), student_of(source)
    theta = copy.deepcopy(model.unet).requires_grad_(True)
    second = copy.deepcopy(theta)
    reading = _Plain(model, lend("plain"), targets)
    released, seen = _trained(model, run, PAPER, targets)
    inner, outer = adamw(second, 2e-4), adamw(theta, 4e-4)
    lower, upper, gaps = [], [], []
    index = itertools.count()
    for done in range(4):
        lower += [stepped(*inner, reading.lower(second, next(index))) for _ in range(4)]
        at = next(index)
        with torch.no_grad():
            gaps.append(float(reading.lower(theta, at) - reading.lower(second, at)))
            upper.append(float(reading.upper(theta, done)))
        stepped(*outer, reading.upper(theta, done) + 100.0 * reading.lower(theta, at))

    print(f"weights differ by {apart(released, theta):.1e}; gaps {gaps}")
    assert seen["lower_loss"] == pytest.approx(lower, rel=1e-6)
    assert seen["upper_loss"] == pytest.approx(upper, rel=1e-6)
    assert seen["fine_tuning_gap"] == pytest.approx(gaps, abs=1e-6)
    assert run.ledger.numbers["fine_tuning_gap"] == seen["fine_tuning_gap"][-1]
    assert apart(released, theta) < 1e-6
    assert (run.ledger.numbers["general_samples"], run.ledger.numbers["concept_samples"]) == (80, 16)
    # a lower batch an iteration, and the gap's pass of the second student
    assert (run.ledger.forward_passes, run.ledger.backward_passes) == (2 * 80 + 4 * 4 + 3 * 16, 80 + 16)


def test_the_second_student_has_no_part_in_the_first(source, lend, targets):
    """Its term has no gradient in theta: with another rate it ends elsewhere, and theta is the same to the bit."""
    ends = []
    for rate in (2e-4, 1e-3):
        p = dataclasses.replace(PAPER, lower_learning_rate=rate)
        ends.append(_trained(student_of(source), lend(f"rate{rate}"), p, targets))
    (first, numbers), (again, others) = ends

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert numbers["fine_tuning_gap"] != others["fine_tuning_gap"]


class _Dead(BaseException):
    """The process ends."""


@pytest.mark.parametrize("p", [RELEASED, PAPER], ids=["released", "paper"])
@pytest.mark.parametrize("killed_after", [4, 5, 12])
def test_killed_it_ends_as_undisturbed_to_the_bit(source, lend, targets, p, killed_after):
    """Before, after and between upper steps: weights of both students, moments and numbers."""
    whole_run, run = lend("whole"), lend("killed")
    whole, _ = _trained(student_of(source), whole_run, p, targets)
    run.checkpoint_interval_s = 0.0

    def report(done: int, total: int) -> None:
        if done == killed_after + 1:
            raise _Dead

    run.report = report
    with pytest.raises(_Dead):
        BilevelSuppress(p).protect(student_of(source), targets, [], run)
    resumed = dataclasses.replace(lend("again"), folder=run.folder)
    assert resumed.saved_step() == killed_after
    ours, _ = _trained(student_of(source), resumed, p, targets)

    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert resumed.ledger.numbers == whole_run.ledger.numbers
    assert resumed.ledger.forward_passes == whole_run.ledger.forward_passes


def test_a_state_without_theta_is_dropped_and_said(source, lend, targets):
    """A state of the other profile does not fit, although its weights do; the run starts over."""
    run = lend("other")
    run.keeps_end = True
    _trained(student_of(source), run, dataclasses.replace(RELEASED, steps=5), targets)
    again, said = dataclasses.replace(lend("again"), folder=run.folder), []
    again.notify = said.append
    ours, _ = _trained(student_of(source), again, PAPER, targets)
    whole, _ = _trained(student_of(source), lend("whole"), PAPER, targets)

    assert len(said) == 1 and "does not fit bilevel fine-tuning: it has no 'theta/" in said[0]
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_recipes_of_one_seed_see_the_same_batches(source, lend, targets):
    """The general ones of `distill`, the concepts' of `suppress`: their rows are paired."""
    chosen: dict[str, list] = {}
    for name, defense in (
        ("bilevel", BilevelSuppress(dataclasses.replace(RELEASED, steps=5))),
        ("distill", Distill(Distill.Parameters(steps=5, batch_size=4))),
        ("suppress", Suppress(Suppress.Parameters(steps=1, batch_size=4))),
    ):
        with pytest.MonkeyPatch.context() as patch:
            seen = chosen[name] = []
            add = diffusion.draw_noise
            for module in ("general_pairs", "diffusion"):
                patch.setattr(
                    f"harness.training.{module}.draw_noise",
                    lambda *given: seen.append(add(*given)) or seen[-1],  # noqa: B023
                )
            defense.protect(student_of(source), targets, [], lend(name))
    own = chosen["bilevel"]

    assert len(own) == 6
    for one, other in zip(own, [*chosen["distill"], *chosen["suppress"]], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_steps_of_the_profiles():
    """The released checkpoint has 2,000 upper steps; the digest's 20,000 steps over both loops hold 952 outer ones."""
    released, paper = Parameters(), Parameters(profile="paper")

    assert (released.upper_steps, released.iterations) == (2000, 20_000)
    assert (paper.upper_steps, paper.iterations) == (952, 952 * 21)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 9}, "steps must be at least 10"),
        ({"profile": "paper", "steps": 20}, "steps must be at least 21"),
        ({"penalty": 0}, "penalty: must be greater than 0"),
        ({"denoising_weight": 0, "output_weight": 0, "block_weight": 0}, "are all 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(given, message):
    """Before any compute."""
    _, mistakes = parameters.resolve(BilevelSuppress, given)

    assert message in "; ".join(f"{name}: {text}" if name else text for name, text in mistakes)
