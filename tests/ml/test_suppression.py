"""Suppression: its target, twenty steps against a plain loop, images of several concepts, and what is counted."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from defenses.pruning.suppress import Parameters, Suppress
from harness.core.sharding import Sharding
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from harness.training import diffusion
from harness.training.suppression import Suppression, negated
from harness.training.weights import differentiate
from tests import tiny
from tests.ml.students import adamw, apart, concepts, lent, stepped, student_of, upper_loss

SMALL = Parameters(steps=20, batch_size=4, learning_rate=1e-3, warmup_steps=4)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def source(request, tmp_path_factory):
    """The source of a tiny model that predicts noise, or velocity."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_pipeline(folder / "model", prediction_type=request.param)
    torch.set_num_threads(1)
    return resolve_model(ModelSpec(id=str(folder / "model")), "test", folder)


def _all(targets):
    return [image for t in targets for image in t.images], [caption for t in targets for caption in t.captions]


def _loss(model, run, targets, **changes) -> Suppression:
    given = {"batch_size": 5, "strength": 1.0, "flip": True, "seed": 3, **changes}
    return Suppression(model, run.teacher, run, *_all(targets), **given)


def test_the_target_at_strength_one():
    """2 f(x, "") - f(x, c), and at strength 0 the unconditional prediction."""
    empty, named = torch.randn(2, 3, 4, dtype=torch.float64)

    assert torch.allclose(negated(empty, named, 1.0), 2 * empty - named)
    assert torch.equal(negated(empty, named, 0.0), empty)


def test_twenty_steps_are_those_of_a_plain_loop(source, tiny_folder, make_run):
    """Losses and weights, with the same draws, towards the teacher's negation: not towards the student's own."""
    run, model, targets = lent(make_run(), source, ()), student_of(source), concepts(tiny_folder)
    plain, teacher, scheduler = copy.deepcopy(model.unet), run.teacher.unet, model.noise_scheduler()
    plain.requires_grad_(True)
    encoded = diffusion.encode_images(model, make_run(1, "plain"), *_all(targets), flip=True)
    nothing = model.encode_text([""])
    seen: list[float] = []
    run.track = lambda name, value, step: seen.append(value)
    released = Suppress(SMALL).protect(model, targets, [], run)
    optimizer, schedule = adamw(plain, 1e-3, warmup=4)
    losses = []
    for step in range(20):
        batch = diffusion.draw(encoded, 4, 1000, seed=run.seed_for("upper"), step=step, device="cpu")
        losses.append(stepped(optimizer, schedule, upper_loss(plain, teacher, scheduler, batch, nothing)))

    print(f"weights differ by {apart(released.tensors, plain):.1e}")
    assert seen == pytest.approx(losses, rel=1e-6)
    assert apart(released.tensors, plain) < 1e-6
    assert run.ledger.numbers["concept_samples"] == 80
    assert run.ledger.numbers["trainable_parameters"] == sum(p.numel() for p in plain.parameters())
    # of each example one pass of the student, and two of the teacher, which have no backward pass
    assert (run.ledger.forward_passes, run.ledger.backward_passes) == (240, 80)
    assert model.is_restorable() and run.teacher.is_restorable() and not run.teacher._originals


def test_images_of_all_concepts_come_in_shuffled_epochs(source, tiny_folder, make_run):
    """Three of one and two of the other: each once in five."""
    run, model = lent(make_run(), source, ()), student_of(source)
    loss = _loss(model, run, concepts(tiny_folder))
    orders = [tuple(part.batch.chosen.tolist()) for step in range(4) for part in loss.at(step)]

    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len(set(orders)) > 1


def test_strength_moves_the_target(source, tiny_folder, make_run):
    """By the guidance that the teacher gives the caption."""
    run, model, targets = lent(make_run(), source, ()), student_of(source), concepts(tiny_folder)
    none, half, full = (_loss(model, run, targets, strength=s).at(0)[0].target for s in (0.0, 0.5, 1.0))

    assert torch.allclose(half, (none + full) / 2, atol=1e-5)
    assert not torch.allclose(none, full, atol=1e-4)


def test_micro_batches_add_up_to_the_whole(source, tiny_folder, make_run):
    """Of one example each."""
    run, model, targets = lent(make_run(), source, ()), student_of(source), concepts(tiny_folder)
    names = {name: p for name, p in model.parameters().items() if name.startswith("unet.")}
    whole, parts = (
        torch.cat([g.flatten() for g in differentiate(_loss(model, each, targets).at(1), names).values()])
        for each in (run, dataclasses.replace(run, sharding=Sharding(micro_batch_size=1)))
    )

    assert (parts - whole).norm() < 1e-5 * whole.norm()
