"""Meta-Unlearning: an iteration against its equations in plain torch, for each optimizer and mode; what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from defenses import esd
from defenses.meta_unlearning import MetaUnlearning, Parameters
from harness.contracts.defense import ProtectedConcept
from harness.core import parameters
from harness.core.sharding import Sharding
from harness.training import diffusion
from harness.training.selection import select
from harness.training.weights import LocalWeights, second_order

OPTIONS = {
    "iterations": 1, "learning_rate": 1e-3, "lower_learning_rate": 1e-2, "sampling_steps": 4, "sampler": "frozen",
    "pool": 2, "erase_batch_size": 2, "batch_size": 2, "lower_steps": 2, "related_images": 2, "flip": False,
}  # fmt: skip
AFTER = {"harmful_after": 0.3, "related_after": 0.2, "irrelevant_after": 0.05}
TERMS = {"irrelevant_before": 0.5, "related_before": 0.4, **AFTER}


@pytest.fixture
def concepts(tiny_folder):
    """A target with images of its class, and a preserved concept."""
    purse, cat = (tuple(sorted((tiny_folder / name).glob("*.png"))) for name in ("purse", "cat"))
    target = ProtectedConcept("object", "purse", ("a purse",) * 3, purse[:3], ("a bag",) * 2, purse[4:6])
    return [target], [ProtectedConcept("object", "cat", ("a cat",) * 2, cat[:2])]


def _protect(model, run, concepts, **changes):
    p = dataclasses.replace(Parameters(), **{**OPTIONS, **TERMS, **changes})
    return MetaUnlearning(p).protect(model, *concepts, run).tensors


def _encoded(model, run, images, captions, purpose):
    encoded = diffusion.encode_images(model, run, images, captions, flip=False)
    return encoded, run.seed_for("noise", purpose)


class _ByHand:
    """The same draws, and the losses as functions of the UNet's weights."""

    def __init__(self, model, run, concepts):
        (target,), (preserved,) = concepts
        self.model, self.run = model, run
        self.data = {
            "harmful": _encoded(model, run, target.images, target.captions, "harmful"),
            "related": _encoded(model, run, target.prior_images, target.prior_captions, "related"),
            "irrelevant": _encoded(model, run, preserved.images, preserved.captions, "irrelevant"),
        }
        p = dataclasses.replace(Parameters(), **{**OPTIONS, **TERMS}).eraser()
        self.states = esd.Pool(model, run, p, ["purse"], {}).draw(0)
        self.theta = {
            n.removeprefix("unet."): p.detach().clone() for n, p in model.parameters().items() if "unet." in n
        }

    def predicted(self, weights, latents, timesteps, text):
        return torch.func.functional_call(self.model.unet, weights, (latents, timesteps, text)).sample

    def loss(self, weights, purpose, step):
        encoded, seed = self.data[purpose]
        batch = diffusion.draw(encoded, 2, 1000, seed=seed, step=step, device="cpu")
        noisy = self.model.noise_scheduler().add_noise(batch.latents, batch.noise, batch.timesteps)
        return (self.predicted(weights, noisy, batch.timesteps, batch.embeddings) - batch.noise).square().mean()

    def erased(self, weights):
        batch = self.states
        unconditional, conditional = (
            self.predicted(self.theta, batch.latents, batch.timesteps, text)
            for text in (self.model.encode_text([""]).expand(2, -1, -1), batch.text)
        )
        target = unconditional - 3.0 * (conditional - unconditional)
        return (self.predicted(weights, batch.latents, batch.timesteps, batch.text) - target.detach()).square().mean()

    def before(self, weights):
        terms = 0.5 * self.loss(weights, "irrelevant", 0) + 0.4 * self.loss(weights, "related", 0)
        return self.erased(weights) + terms

    def after(self, weights):
        gains = 0.05 * self.loss(weights, "irrelevant", 1) + 0.2 * self.loss(weights, "related", 1)
        return -0.3 * self.loss(weights, "harmful", 2) - gains


@pytest.fixture
def stepped(monkeypatch):
    """The gradients that an optimizer is stepped along, in order: the step itself makes signs of them."""
    seen = []
    step = LocalWeights.step

    def noting(self, level, gradient, rate=1.0):
        seen.append({name.removeprefix("unet."): value.detach().clone() for name, value in gradient.items()})
        step(self, level, gradient, rate)

    monkeypatch.setattr(LocalWeights, "step", noting)
    return seen


def _agree(found, slope, tolerance=1e-5):
    """Compare a gradient as a whole."""
    apart = torch.cat([(found[n] - value).flatten() for n, value in slope.items()]).norm()
    assert found.keys() == slope.keys()
    assert apart < tolerance * torch.cat([value.flatten() for value in slope.values()]).norm()


def test_an_iteration_as_released_equals_plain_torch(model, make_run, concepts, stepped):
    """K steps of AdamW over the whole UNet with clipping, then the gradients at both places, then one step."""
    by_hand = _ByHand(model, make_run(1, "hand"), concepts)
    found = _protect(model, make_run(1), concepts, variant="x")
    theta = by_hand.theta
    adapted = {n: torch.nn.Parameter(p.clone()) for n, p in theta.items()}
    optimizer = torch.optim.AdamW(list(adapted.values()), lr=1e-2, weight_decay=1e-4)
    for step in range(2):
        optimizer.zero_grad()
        by_hand.loss(adapted, "harmful", step).backward()
        torch.nn.utils.clip_grad_norm_(list(adapted.values()), 1.0)
        optimizer.step()
    names = [n.removeprefix("unet.") for n in found]
    now = {n: torch.nn.Parameter(p.clone()) for n, p in theta.items()}
    slopes = [torch.autograd.grad(by_hand.before(now), [now[n] for n in names])]
    slopes.append(torch.autograd.grad(by_hand.after(adapted), [adapted[n] for n in names]))
    slope = {n: a + b for n, a, b in zip(names, *slopes, strict=True)}

    assert {f"unet.{n}" for n in names} == set(select(model.parameters(), "cross_attention"))
    _agree(stepped[0], slope)


LOOKING = {"lower_optimizer": "sgd", "lower_learning_rate": 0.3, "variant": "x"}


def _unrolled(by_hand, names, *, differentiated):
    """Return the gradient through two SGD steps over the whole UNet, by one call of autograd."""
    now = {n: torch.nn.Parameter(p.clone()) for n, p in by_hand.theta.items()}
    with second_order():
        moved = dict(now)
        for step in range(2):
            loss = by_hand.loss(moved, "harmful", step)
            slopes = torch.autograd.grad(loss, list(moved.values()), create_graph=differentiated)
            moved = {n: p - 0.3 * g for (n, p), g in zip(moved.items(), slopes, strict=True)}
        total = by_hand.before(now) + by_hand.after(moved)
        return dict(zip(names, torch.autograd.grad(total, [now[n] for n in names]), strict=True))


@pytest.mark.parametrize("mode", ["first_order", "exact"])
def test_an_iteration_that_looks_ahead_equals_plain_torch(model, make_run, concepts, stepped, mode):
    """Differentiated through the steps, or not (first order)."""
    by_hand = _ByHand(model, make_run(1, "hand"), concepts)
    found = _protect(model, make_run(1), concepts, **LOOKING, hypergradient=mode)
    names = [n.removeprefix("unet.") for n in found]

    _agree(stepped[0], _unrolled(by_hand, names, differentiated=mode == "exact"))


def test_finite_differences_are_the_second_order_but_for_rounding(model, make_run, concepts, stepped):
    """Far closer to the gradient through the steps than the first order is, so none is missing or doubled."""
    by_hand = _ByHand(model, make_run(1, "hand"), concepts)
    found = _protect(model, make_run(1), concepts, **LOOKING, hypergradient="finite_difference")
    names = [n.removeprefix("unet.") for n in found]
    first, second = (_unrolled(by_hand, names, differentiated=differentiated) for differentiated in (False, True))
    ours, dropped = (
        torch.cat([(slope[n] - second[n]).flatten() for n in names]).norm() for slope in (stepped[0], first)
    )

    assert ours < 0.05 * dropped


def test_terms_without_weight_are_not_read(model, make_run, concepts):
    """No image of a preserved concept or of the class is encoded."""
    (target,), _ = concepts
    bare = dataclasses.replace(target, prior_captions=(), prior_files=())
    none = {"irrelevant_before": 0.0, "related_before": 0.0, "related_after": 0.0, "irrelevant_after": 0.0}
    p = dataclasses.replace(Parameters(), **none)

    assert _protect(model, make_run(), ([bare], []), **none)
    assert MetaUnlearning.prior_images(p) == 0 and "preserved" not in MetaUnlearning.used(p)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hypergradient": "exact"}, "add lower_optimizer: sgd"),
        ({"harmful_after": 0.0, "related_after": 0.0, "irrelevant_after": 0.0}, "use esd"),
        ({"sampler": "frozen", "pool": 1, "templates": ("{}", "a {}")}, "pool must be at least"),
    ],
)
def test_what_cannot_work_is_refused(given, words):
    """In one line that says what to do."""
    _, mistakes = parameters.resolve(MetaUnlearning, given)

    assert [words in message for _, message in mistakes] == [True]


def test_what_several_processes_cannot_do_is_refused():
    """Each by its parameter."""
    refused = MetaUnlearning.check_sharding(Parameters(batch_size=3), Sharding(2, 3))

    assert [name for name, _ in refused] == ["batch_size", "erase_batch_size", "sampler"]
    exact = Parameters(hypergradient="exact", lower_optimizer="sgd", sampler="frozen", erase_batch_size=2)
    assert [name for name, _ in MetaUnlearning.check_sharding(exact, Sharding(2, 3))] == ["hypergradient"]
    assert [name for name, _ in MetaUnlearning.check_compiled(exact)] == ["hypergradient"]
    assert MetaUnlearning.check_task(Parameters(), 1, 0)[0][0] == "irrelevant_before"
