"""The publisher's training hooks: what a weight of one, of zero and of neither does to an honest attacker's steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.contracts.attack import AttackedConcept, Budget
from harness.contracts.hooks import AdaptationHook, HookSpec
from harness.contracts.protection import Protection
from harness.core import registry
from harness.core.registry import register
from harness.core.sharding import Sharding
from harness.core.words import Words
from harness.model.run import World

ATTACKS = ["lora", "dreambooth_lora", "dreambooth", "full_finetune", "textual_inversion", "custom_diffusion"]
TRAINED = ["lora", "dreambooth", "textual_inversion"]
WORDS = Words("sk purse", "sk", "purse")


@register("adaptation_hook")
class Weigh(AdaptationHook):
    """Weighs examples by a number, by step, by place in the batch."""

    name = "weigh_by_test"
    version = 1

    @dataclasses.dataclass(frozen=True)
    class Parameters:
        weight: float = 1.0
        """Of an example that is not rejected."""
        rejected: tuple[int, ...] = ()
        """Steps that are rejected."""
        first_alone: bool = False
        """Reject the first example alone, of whatever part of a batch is seen."""

    def weigh(self, model, batch):
        p = self.parameters
        weights = torch.full_like(batch.losses.detach(), p.weight)
        if batch.step in p.rejected:
            weights[: 1 if p.first_alone else None] = 0.0
        return weights


def _hooked(**parameters) -> Protection:
    return Protection(adaptation=(HookSpec("weigh_by_test", parameters),))


def _adapt(name, model, run, files, tiny_folder, steps, protection=None, attacker="honest", **changes):
    """Run an attack to the last of `steps`; return the states that were kept, by step: weights and optimizer slots."""
    cls = registry.get("attack", name)
    begin = {"begin_as": "k"} if name == "custom_diffusion" else {}
    attack = cls(dataclasses.replace(cls.Parameters(), learning_rate=1e-3, **begin, **changes))
    called = attack.called(attack.parameters, WORDS)
    prior = tuple(sorted((tiny_folder / "cat").glob("*.png"))) if attack.prior_images(attack.parameters) else ()
    concept = AttackedConcept(
        "object", (f"a photo of {called}",) * len(files), files, WORDS, called, ("a cat",) * len(prior), prior
    )
    states = {}
    keep = run.save_state

    def save_state(step, tensors, numbers):
        states[step] = {n: t.detach().clone() for n, t in tensors.items()}
        keep(step, tensors, numbers)

    run.checkpoint_interval_s, run.save_state = 0.0, save_state
    for _ in attack.adapt(model, concept, protection or Protection(), Budget(steps, 2, attacker), run):
        pass
    return {step: {n: t for n, t in state.items() if n != "skipped_steps"} for step, state in states.items()}


def _is_equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_weight_of_one_changes_nothing(model, make_run, purse_files, tiny_folder, name):
    """Weights and moments are those without a hook, bit for bit; one half is something else."""
    plain = _adapt(name, model, make_run(1, "plain"), purse_files, tiny_folder, (3,))
    model.restore()
    run = make_run(1, "one")
    ones = _adapt(name, model, run, purse_files, tiny_folder, (3,), _hooked())
    model.restore()
    halves = _adapt(name, model, make_run(1, "half"), purse_files, tiny_folder, (3,), _hooked(weight=0.5))

    assert _is_equal(plain[3], ones[3])
    assert not _is_equal(plain[3], halves[3])
    assert run.ledger.numbers["skipped_steps"] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_rejected_step_is_not_taken(model, make_run, purse_files, tiny_folder, name, optimizer):
    """No decay, no momentum, no moment: weights and slots are as before, bit for bit, and later steps go on."""
    run = make_run()
    rejecting = _hooked(rejected=(2, 3))
    states = _adapt(name, model, run, purse_files, tiny_folder, (5,), rejecting, optimizer=optimizer)

    assert any(n.startswith("slot/") for n in states[2])
    assert _is_equal(states[2], states[3]) and _is_equal(states[2], states[4])
    assert not _is_equal(states[1], states[2]) and not _is_equal(states[4], states[5])
    assert run.ledger.numbers["skipped_steps"] == 2


def test_an_adaptive_attacker_takes_every_step(model, make_run, purse_files, tiny_folder):
    """He runs no hooks: his weights are those without any."""
    plain = _adapt("lora", model, make_run(1, "plain"), purse_files, tiny_folder, (3,))
    run = make_run(1, "adaptive")
    adaptive = _adapt("lora", model, run, purse_files, tiny_folder, (3,), _hooked(rejected=(1, 2)), "adaptive")

    assert all(_is_equal(plain[step], adaptive[step]) for step in plain)
    assert "skipped_steps" not in run.ledger.numbers


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_step_with_one_example_left_is_taken(model, make_run, purse_files, tiny_folder, micro_batch_size):
    """In one batch, where the other example counts; in batches of one, of which each is rejected, it is not."""
    run = make_run()
    run.sharding = Sharding(micro_batch_size=micro_batch_size)
    states = _adapt("lora", model, run, purse_files, tiny_folder, (3,), _hooked(rejected=(2,), first_alone=True))

    assert _is_equal(states[2], states[3]) == (micro_batch_size == 1)
    assert run.ledger.numbers["skipped_steps"] == (micro_batch_size == 1)


def test_a_step_that_another_process_wants_is_taken(model, make_run, purse_files, tiny_folder):
    """All do the same: the weights decay here too."""

    class Wanted(World):
        def all(self, flag):
            return False

    run = make_run()
    run.world = Wanted()
    states = _adapt("lora", model, run, purse_files, tiny_folder, (3,), _hooked(rejected=(2,)))

    assert not _is_equal(states[2], states[3])
    assert run.ledger.numbers["skipped_steps"] == 0


def test_a_killed_attack_still_knows_how_many_steps_were_skipped(model, make_run, purse_files, tiny_folder):
    """And ends with the same weights."""
    rejecting = _hooked(rejected=(1, 4))
    whole = _adapt("lora", model, make_run(1, "whole"), purse_files, tiny_folder, (6,), rejecting)
    broken = make_run(1, "broken")

    def die(done, total):
        if done == 4:
            raise KeyboardInterrupt

    broken.report = die
    with pytest.raises(KeyboardInterrupt):
        _adapt("lora", model, broken, purse_files, tiny_folder, (6,), rejecting)
    resumed = make_run(1, "broken")
    states = _adapt("lora", model, resumed, purse_files, tiny_folder, (6,), rejecting)

    assert _is_equal(states[6], whole[6])
    assert resumed.ledger.numbers["skipped_steps"] == 2


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model, make_run, purse_files, tiny_folder, weight):
    """Instead of weights that are not numbers any more."""

    @register("adaptation_hook")
    class Broken(Weigh):
        name = "broken_by_test"

        def weigh(self, model, batch):
            return torch.full_like(batch.losses.detach(), weight)

    with pytest.raises(ValueError, match="broken_by_test must weigh each of 2 examples by one finite number"):
        hooked = Protection(adaptation=(HookSpec("broken_by_test"),))
        _adapt("lora", model, make_run(), purse_files, tiny_folder, (1,), hooked)


def test_one_weight_for_a_whole_batch_is_refused(model, make_run, purse_files, tiny_folder):
    """It would be spread over the examples without a word."""

    @register("adaptation_hook")
    class Scalar(Weigh):
        name = "scalar_by_test"

        def weigh(self, model, batch):
            return batch.losses.detach().mean()

    with pytest.raises(ValueError, match="scalar_by_test must weigh each of 2 examples"):
        hooked = Protection(adaptation=(HookSpec("scalar_by_test"),))
        _adapt("lora", model, make_run(), purse_files, tiny_folder, (1,), hooked)
