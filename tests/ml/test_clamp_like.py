"""CLAMP-like: the gradient of its objective against autograd in plain torch, term by term and together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from defenses.clamp_like import ClampLike, Parameters
from harness.contracts.defense import ProtectedConcept
from harness.core import parameters, registry
from harness.core.sharding import Sharding
from harness.training import diffusion
from harness.training.selection import select
from harness.training.weights import LocalWeights, second_order

ALPHA = 0.1
OPTIONS = {
    "trained": "cross_attention", "rounds": 1, "batch_size": 2, "class_images": 2, "lower_steps": 2, "clip_norm": None,
    "lower_learning_rate": ALPHA, "hypergradient": "exact", "flip": False, "learning_rate": 1e-3, "smoothness": 0.5,
    "probe": 0.5, "reach": 0.05, "margin": -10.0, "least_curvature": 0.3, "most_contraction": 0.7,
}  # fmt: skip
NONE = {"primary": 0.0, "long_term": 0.0, "contraction": 0.0, "trap": 0.0, "inverse": 0.0}
TERMS = {
    "long_term": {**NONE, "long_term": 1.3},
    "contraction": {**NONE, "contraction": 1.3},
    "trap": {**NONE, "trap": 1.3},
    "inverse": {**NONE, "inverse": 1.3, "primary": 0.6},
    "all": {"primary": 0.6, "long_term": 0.7, "contraction": 0.8, "trap": 0.9, "inverse": 0.4},
}


@pytest.fixture
def concepts(tiny_folder):
    """A target with images of its class."""
    purse = tuple(sorted((tiny_folder / "purse").glob("*.png")))
    return [ProtectedConcept("object", "purse", ("a purse",) * 3, purse[:3], ("a bag",) * 2, purse[4:6])], []


@pytest.fixture
def stepped(monkeypatch):
    """The gradients that the optimizer is stepped along."""
    seen = []
    step = LocalWeights.step

    def noting(self, level, gradient, rate=1.0):
        seen.append({n: v.detach().clone() for n, v in gradient.items()})
        step(self, level, gradient, rate)

    monkeypatch.setattr(LocalWeights, "step", noting)
    return seen


def _protect(model, run, concepts, **changes):
    p = dataclasses.replace(Parameters(), **{**OPTIONS, **changes})
    return ClampLike(p).protect(model, *concepts, run).tensors, run.ledger.numbers


def _norm(values):
    return torch.cat([v.flatten() for v in values]).norm()


class _ByHand:
    """The objective in fp64, as one function of w_0 that autograd differentiates."""

    def __init__(self, model, run, concepts):
        import copy

        ((target,), _) = concepts
        self.unet = copy.deepcopy(model.unet).double()
        self.scheduler = model.noise_scheduler()
        pairs = (("harmful", target.images, target.captions), ("benign", target.prior_images, target.prior_captions))
        self.data = {
            purpose: (diffusion.encode_images(model, run, images, captions, flip=False), run.seed_for("noise", purpose))
            for purpose, images, captions in pairs
        }
        self.names = [n.removeprefix("unet.") for n in select(model.parameters(), "cross_attention")]
        generator = torch.Generator().manual_seed(run.seed_for("probe", 0))
        start = [self.unet.get_parameter(n).detach() for n in self.names]
        drawn = [torch.randn(w.shape, generator=generator).double() for w in start]
        self.probe = [d / _norm(drawn) for d in drawn]
        self.length = _norm(start)
        self.start = start

    def loss(self, weights, purpose, step):
        encoded, seed = self.data[purpose]
        batch = diffusion.draw(encoded, 2, 1000, seed=seed, step=step, device="cpu")
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps).double()
        given = dict(zip(self.names, weights, strict=True))
        said = torch.func.functional_call(self.unet, given, (noisy, batch.timesteps, batch.embeddings.double())).sample
        return (said - batch.noise).square().mean()

    def slope(self, weights, step):
        return torch.autograd.grad(self.loss(weights, "harmful", step), weights, create_graph=True)

    def objective(self, w0, p):
        points, total = [w0], 0.0
        for t in range(2):
            slope = self.slope(points[t], t)
            along = [-g.detach() / _norm(slope).detach() for g in slope]
            h = p.reach * self.length
            sides = [[w + s * h * d for w, d in zip(points[t], along, strict=True)] for s in (1, -1)]
            ends = sum(self.loss(side, "harmful", t) for side in sides)
            curvature = (ends - 2 * self.loss(points[t], "harmful", t)) / h**2
            total = total + p.trap * torch.nn.functional.softplus(p.least_curvature - curvature)
            points.append([w - ALPHA * g for w, g in zip(points[t], slope, strict=True)])
        last, eps = points[-1], p.probe * self.length
        probed = [w + eps * v for w, v in zip(last, self.probe, strict=True)]
        here, there = self.slope(last, 2), self.slope(probed, 2)
        after, before = (
            [w - ALPHA * g for w, g in zip(at, slope, strict=True)] for at, slope in ((probed, there), (last, here))
        )
        c = _norm([a - b for a, b in zip(after, before, strict=True)]) / eps
        distance = ALPHA * _norm(here) / (1 - c.clamp(max=0.99))
        tail = _norm(here) * distance + p.smoothness / 2 * distance**2
        gain = self.loss(w0, "harmful", 2) - self.loss(last, "harmful", 2)
        total = total + p.long_term * torch.relu(gain + tail - p.margin)
        total = total + p.contraction * torch.nn.functional.softplus(c - p.most_contraction)
        numbers = {"contraction": c, "tail_gain": tail, "gain": gain}
        kept = p.primary * self.loss(w0, "benign", 0)
        return total + kept - p.inverse * self.loss(w0, "harmful", 2), numbers

    def gradient(self, p):
        w0 = [w.clone().requires_grad_(True) for w in self.start]
        with second_order():
            total, numbers = self.objective(w0, p)
            slopes = torch.autograd.grad(total, w0)
        return dict(zip(self.names, slopes, strict=True)), {n: float(v) for n, v in numbers.items()}


@pytest.mark.parametrize("terms", TERMS)
def test_a_round_equals_autograd_through_the_whole_objective(model, make_run, concepts, stepped, terms):
    """In fp64, with third derivatives of the loss where the contraction is concerned.

    The contraction's gradient is a difference of two products with H at a distance eps, which fp32 rounds by 7e-7 of
    each. The terms are exact for any eps, so eps is large here, and this rounding stays below the tolerance.
    """
    by_hand = _ByHand(model, make_run(1, "hand"), concepts)
    p = dataclasses.replace(Parameters(), **{**OPTIONS, **TERMS[terms]})
    expected, numbers = by_hand.gradient(p)
    _, noted = _protect(model, make_run(1), concepts, **TERMS[terms])
    found = {n.removeprefix("unet."): v for n, v in stepped[0].items()}
    apart = _norm([found[n] - v for n, v in expected.items()]) / _norm(expected.values())
    print(f"{terms}: {apart:.1e}, {numbers}")

    assert apart < 1e-5
    for name, value in numbers.items():
        assert noted[name] == pytest.approx(value, rel=1e-4, abs=1e-7)


def test_finite_differences_come_near_the_exact_gradient(model, make_run, concepts, stepped):
    """Products with H by central differences of fp32; the same but for their rounding."""
    for mode in ("exact", "finite_difference"):
        _protect(model, make_run(1, mode), concepts, **TERMS["all"], hypergradient=mode)
        model.restore()
    exact, ours = stepped

    assert _norm([ours[n] - v for n, v in exact.items()]) < 1e-2 * _norm(exact.values())


def test_beyond_the_margin_the_long_term_is_off(model, make_run, concepts, stepped):
    """A hinge: no gradient where the attacker gains less."""
    _protect(model, make_run(1), concepts, **{**TERMS["long_term"], "margin": 100.0})

    assert _norm(stepped[0].values()) == 0


def test_it_is_listed_as_second_hand():
    """Nobody is to take its numbers for the authors'."""
    assert "second-hand" in registry.describe(registry.get("defense", "clamp_like"))["summary"]


def test_what_cannot_work_is_refused():
    """By parameter."""
    _, mistakes = parameters.resolve(ClampLike, {"long_term": 0, "contraction": 0, "trap": 0, "inverse": 0})
    assert "nothing is immunized" in mistakes[0][1]
    assert ClampLike.check_task(Parameters(benign="preserved"), 1, 0)[0][0] == "benign"
    assert [n for n, _ in ClampLike.check_sharding(Parameters(hypergradient="exact"), Sharding(2, 3))] == [
        "batch_size", "hypergradient"
    ]  # fmt: skip
    assert [n for n, _ in ClampLike.check_compiled(Parameters(hypergradient="exact"))] == ["hypergradient"]
