"""ResAlign: a step against its equations in plain torch, what an adapter releases, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from defenses.resalign import RELEASED, Parameters, ResAlign
from harness.contracts.defense import ProtectedConcept
from harness.core import parameters
from harness.core.sharding import Sharding
from harness.training import diffusion
from harness.training.implicit import FixedPoint
from harness.training.selection import select
from harness.training.weights import LocalWeights, second_order

OPTIONS = {
    "steps": 1, "simulations": (("sgd", 0.2, 2), ("adam", 1e-3, 2)), "simulated": 1, "batch_size": 2,
    "retention_batch_size": 2, "iterations": 3, "most_norm": None, "flip": False, "resilience": 0.7, "retention": 1.5,
    "last_retention": 2.5,
}  # fmt: skip


@pytest.fixture
def concepts(tiny_folder):
    """A target with images of its class, and a preserved concept."""
    purse, cat = (tuple(sorted((tiny_folder / name).glob("*.png"))) for name in ("purse", "cat"))
    target = ProtectedConcept("object", "purse", ("a purse",) * 3, purse[:3], ("a bag",) * 2, purse[4:6])
    return [target], [ProtectedConcept("object", "cat", ("a cat",) * 2, cat[:2])]


@pytest.fixture
def stepped(monkeypatch):
    """The gradients that an optimizer is stepped along, in order, and the weights before."""
    seen = []
    step = LocalWeights.step

    def noting(self, level, gradient, rate=1.0):
        start = {n: v.clone() for n, v in self.read(list(gradient)).items()}
        seen.append(({n: v.detach().clone() for n, v in gradient.items()}, start))
        step(self, level, gradient, rate)

    monkeypatch.setattr(LocalWeights, "step", noting)
    return seen


def _protect(model, run, concepts, **changes):
    p = dataclasses.replace(Parameters(), **{**OPTIONS, **changes})
    return ResAlign(p).protect(model, *concepts, run).tensors


class _ByHand:
    """The same draws, and the losses as functions of attention weights."""

    def __init__(self, model, run, concepts, fine_tuned_on="benign"):
        (target,), (preserved,) = concepts
        self.model, self.scheduler = model, model.noise_scheduler()
        own, benign = (
            diffusion.encode_images(model, run, c.images, c.captions, flip=False) for c in (target, preserved)
        )
        seeds = [run.seed_for("noise", purpose) for purpose in ("unwanted", "tuning", "kept")]
        data = (own, own if fine_tuned_on == "targets" else benign, benign)
        self.data = dict(zip(("unwanted", "tuning", "kept"), zip(data, seeds, strict=True), strict=True))
        self.given = {n: model.parameters()[n].detach().clone() for n in select(model.parameters(), "attention")}

    def _batch(self, purpose, step):
        encoded, seed = self.data[purpose]
        batch = diffusion.draw(encoded, 2, 1000, seed=seed, step=step, device="cpu")
        return batch, self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)

    def _said(self, weights, batch, noisy):
        own = {n.removeprefix("unet."): w for n, w in weights.items()}
        return torch.func.functional_call(self.model.unet, own, (noisy, batch.timesteps, batch.embeddings)).sample

    def loss(self, weights, purpose, step):
        batch, noisy = self._batch(purpose, step)
        return (self._said(weights, batch, noisy) - batch.noise).square().mean()

    def drift(self, weights, step):
        batch, noisy = self._batch("kept", step)
        with torch.no_grad():
            target = self._said(self.given, batch, noisy)
        return (self._said(weights, batch, noisy) - target).square().mean()


def _tuned(by_hand, start, optimizer, rate, steps, first=0):
    """Return fine-tuned weights, by torch's own optimizers."""
    moved = {n: torch.nn.Parameter(w.clone()) for n, w in start.items()}
    made = torch.optim.SGD(moved.values(), rate) if optimizer == "sgd" else torch.optim.Adam(moved.values(), rate)
    for step in range(first, first + steps):
        made.zero_grad()
        by_hand.loss(moved, "tuning", step).backward()
        made.step()
    return {n: w.detach() for n, w in moved.items()}


def _expected(by_hand, start, simulation, *, w, draw=0):
    """Return the hypergradient of one simulation by the map Phi itself, differentiated as the released program does."""
    end = {n: torch.nn.Parameter(v) for n, v in _tuned(by_hand, start, *simulation, draw * 1001).items()}
    theta = {n: torch.nn.Parameter(v.clone()) for n, v in start.items()}
    with second_order():
        upper = -0.3 * by_hand.loss(theta, "unwanted", draw) - 0.7 * by_hand.loss(end, "unwanted", draw)
        upper = upper + w * by_hand.drift(theta, draw)
        outer = torch.autograd.grad(upper, list(end.values()), retain_graph=True)
        direct = torch.autograd.grad(upper, list(theta.values()))
        proximal = sum((a - b).square().sum() for a, b in zip(end.values(), theta.values(), strict=True))
        lower = by_hand.loss(end, "tuning", draw * 1001 + 1000) + 0.5 * proximal
        slopes = torch.autograd.grad(lower, list(end.values()), create_graph=True)
        mapped = [e - g for e, g in zip(end.values(), slopes, strict=True)]
        v = [torch.zeros_like(g) for g in outer]
        for _ in range(3):
            v = torch.autograd.grad(mapped, list(end.values()), grad_outputs=v, retain_graph=True)
            v = [a + b for a, b in zip(v, outer, strict=True)]
        implicit = torch.autograd.grad(mapped, list(theta.values()), grad_outputs=v)
    return {n: a + b for n, a, b in zip(theta, implicit, direct, strict=True)}


W = 1.5 + 1.0 / (1 + math.exp(-5.0))
"""w in a step of one: the second half has begun and is over, so it is at the sigmoid's end."""


def _apart(found, expected):
    norm = torch.cat([v.flatten() for v in expected.values()]).norm()
    return torch.cat([(found[n] - v).flatten() for n, v in expected.items()]).norm() / norm


@pytest.mark.parametrize("fine_tuned_on", ["benign", "targets"])
@pytest.mark.parametrize("simulation", OPTIONS["simulations"], ids=["sgd", "adam"])
def test_a_step_equals_the_released_iteration_in_plain_torch(
    model, make_run, concepts, stepped, simulation, fine_tuned_on
):
    """Simulated fine-tuning, U at both places, R, and three iterations through the Jacobian of Phi."""
    by_hand = _ByHand(model, make_run(1, "hand"), concepts, fine_tuned_on)
    changes = {"trained": "attention", "simulations": (simulation,), "fine_tuned_on": fine_tuned_on}
    _protect(model, make_run(1), concepts, **changes)
    ((found, start),) = stepped

    assert all(torch.equal(start[n], v) for n, v in by_hand.given.items())
    assert _apart(found, _expected(by_hand, start, simulation, w=W)) < 1e-5


def test_simulations_of_a_step_are_averaged(model, make_run, concepts, stepped):
    """Two of them, each with its own batches."""
    by_hand = _ByHand(model, make_run(1, "hand"), concepts)
    both = {"trained": "attention", "simulated": 2}
    _protect(model, make_run(1), concepts, **both)
    ((found, start),) = stepped
    drawn = dataclasses.replace(Parameters(), **{**OPTIONS, **both}).drawn(make_run(1).seed_for("simulations", 0))
    each = [_expected(by_hand, start, simulation, w=W, draw=draw) for draw, simulation in enumerate(drawn)]

    assert sorted(drawn) == sorted(OPTIONS["simulations"])
    assert _apart(found, {n: (each[0][n] + each[1][n]) / 2 for n in found}) < 1e-5


def test_the_adapter_is_merged_and_the_attention_alone_changes(model, make_run, concepts, stepped):
    """W + B A of every projection, by hand from the adapter's last state; biases and all else stay."""
    before = {n: p.detach().clone() for n, p in model.parameters().items()}
    seen = {}
    whole = LocalWeights.whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalWeights, "whole", lambda self, names: seen.setdefault("adapter", whole(self, names)))
        released = _protect(model, make_run(1), concepts, steps=2)
    model.restore()
    factors = seen["adapter"]

    assert set(released) == {n for n in select(before, "attention") if n.endswith(".weight")}
    assert len(factors) == 2 * len(released)
    for name, value in released.items():
        own = name.removeprefix("unet.").removesuffix(".weight")
        product = factors[f"{own}.lora_B.default.weight"] @ factors[f"{own}.lora_A.default.weight"]
        assert factors[f"{own}.lora_A.default.weight"].shape[0] == 4
        assert torch.allclose(value, before[name] + product, atol=1e-6) and not torch.equal(value, before[name])
    assert all(torch.equal(p, before[n]) for n, p in model.parameters().items())


def test_the_adapter_starts_as_released(model, make_run, concepts, stepped):
    """Normal factors of deviations 0.008 and 0.002, so theta is not the given model even before a step."""
    _protect(model, make_run(1), concepts)
    start = stepped[0][1]
    for factor, deviation in (("A", 0.008), ("B", 0.002)):
        values = torch.cat([v.flatten() for n, v in start.items() if f".lora_{factor}." in n])
        assert values.std() == pytest.approx(deviation, rel=0.05)


# -- the fixed point -----------------------------------------------------------------------------------------


def _quadratic(eigenvalues):
    """Return (weights, L with these eigenvalues of its Hessian)."""
    point = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    scales = torch.tensor(eigenvalues, dtype=torch.float64)
    return LocalWeights({"x": point}, {}), [lambda: 0.5 * (scales * point.square()).sum()]


def _fixed(eigenvalues, **rules):
    weights, loss = _quadratic(eigenvalues)
    g = {"x": torch.tensor([1.0, 1.0], dtype=torch.float64)}
    direct = {"x": torch.tensor([0.5, 0.0], dtype=torch.float64)}
    return FixedPoint(mode="exact", **rules).gradient(weights, ["x"], loss, g, direct)


def test_it_converges_to_the_inverse_where_it_contracts():
    """direct + g / (1 + h), for curvatures below one."""
    found = _fixed((0.5, -0.3), iterations=80)

    assert torch.allclose(found.slope["x"], torch.tensor([0.5 + 1 / 1.5, 1 / 0.7], dtype=torch.float64), atol=1e-8)
    assert (found.halvings, found.fell_back) == (0, False)


def test_the_step_size_is_halved_until_it_contracts():
    """|1 - s (1 + h)| < 1 for h = 2.5 from s = 1/2 on; the limit is the same."""
    found = _fixed((2.5, 2.5), iterations=200)

    assert found.halvings == 1
    assert torch.allclose(found.slope["x"], torch.tensor([0.5 + 1 / 3.5, 1 / 3.5], dtype=torch.float64), atol=1e-8)


def test_without_any_step_size_the_direct_gradient_is_used():
    """Negative curvature beyond the proximal term's: no step contracts. The norm's limit falls back too."""
    for found in (_fixed((-3.0, -3.0), iterations=3), _fixed((0.1, 0.1), iterations=3, most_norm=0.01)):
        assert found.fell_back
        assert torch.equal(found.slope["x"], torch.tensor([0.5, 0.0], dtype=torch.float64))


def test_numbers_that_are_not_finite_are_no_reason_to_fall_back():
    """They are to be seen, not replaced."""
    weights, loss = _quadratic((0.1, 0.1))
    g = {"x": torch.tensor([float("nan"), 1.0], dtype=torch.float64)}
    found = FixedPoint(3, "exact", 0.2).gradient(weights, ["x"], loss, g, {"x": torch.zeros(2, dtype=torch.float64)})

    assert not found.fell_back and bool(found.slope["x"].isnan().any())


# -- parameters ----------------------------------------------------------------------------------------------


def test_defaults_are_the_released_script():
    """Fifteen settings, three a step; w from 1.6, after half of the steps along a sigmoid to 2."""
    p = Parameters()

    assert len(RELEASED) == 15 and p.simulated == 3 and p.simulations == RELEASED
    assert sum(s[0] == "adam" for s in RELEASED) == 5
    assert {s[1] for s in RELEASED} == {1e-4, 1e-5, 1e-6} and {s[2] for s in RELEASED} == {5, 10, 20, 30}
    assert p.retention_at(0) == p.retention_at(78) == 1.6
    assert p.retention_at(119) == pytest.approx(1.8)
    assert p.retention_at(159) == pytest.approx(2.0, abs=0.01)


def test_what_cannot_work_is_refused():
    """In one line, by parameter."""
    _, mistakes = parameters.resolve(ResAlign, {"simulations": [["sgd", 1e-3, 2]]})
    assert mistakes[0][1] == "simulated is 3, but simulations has 1"
    assert parameters.resolve(ResAlign, {"simulations": [["lion", 1e-3, 2]]})[1][0][0] == "simulations"
    assert ResAlign.check_task(Parameters(), 1, 0) == [
        ("benign", "the task preserves no concept; list some under 'preserve', or use class")
    ]
    names = [n for n, _ in ResAlign.check_sharding(Parameters(retention_batch_size=3), Sharding(2, 3))]
    assert names == ["batch_size", "retention_batch_size", "hypergradient"]
    assert [n for n, _ in ResAlign.check_compiled(Parameters())] == ["hypergradient"]
    assert ResAlign.check_compiled(Parameters(hypergradient="finite_difference")) == []
