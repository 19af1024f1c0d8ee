"""Hypergradients: modes against each other, and against plain autograd on models small enough to write out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.training import bilevel
from harness.training.bilevel import LookAhead, hypergradient
from harness.training.merge import LayerMerging, Merge
from harness.training.weights import LocalWeights


def _toy() -> tuple[dict[str, nn.Parameter], list[torch.Tensor]]:
    """Two layers in fp64, and batches."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    weights = {"first": nn.Parameter(draw(5, 4)), "second": nn.Parameter(draw(3, 5)), "bias": nn.Parameter(draw(3))}
    return weights, [draw(7, 4) for _ in range(4)]


def _local(weights) -> LocalWeights:
    return LocalWeights(weights, {})


def _loss(weights, batch):
    said = torch.tanh(batch @ weights["first"].T) @ weights["second"].T + weights["bias"]
    return (said.square().mean(1) + said.sum(1).sin()).mean()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("lower", [("first", "second", "bias"), ("second",), ("first", "bias")])
def test_exact_equals_autograd_through_the_steps(lower, steps):
    """Differentiating the unrolled steps by one call of autograd gives the same to 1e-10, for every S_l."""
    weights, batches = _toy()
    before = {name: p.detach().clone() for name, p in weights.items()}
    losses = [[lambda b=b: _loss(weights, b)] for b in batches[:steps]]
    ahead = LookAhead(_local(weights), list(weights), lower, losses, 0.1)
    ours = hypergradient(ahead, [lambda: _loss(weights, batches[3])], "exact")

    moved = dict(weights)
    for batch in batches[:steps]:
        slopes = torch.autograd.grad(_loss(moved, batch), [moved[n] for n in lower], create_graph=True)
        moved |= {n: moved[n] - 0.1 * g for n, g in zip(lower, slopes, strict=True)}
    unrolled = torch.autograd.grad(_loss(moved, batches[3]), list(weights.values()))

    for (name, value), expected in zip(ours.items(), unrolled, strict=True):
        assert (value - expected).abs().max() < 1e-10
        assert torch.equal(weights[name], before[name])


def test_modes_of_a_linear_lower_loss_agree():
    """Without curvature the first order is all there is."""
    weights, batches = _toy()
    loss = lambda: weights["first"].sum() + weights["bias"].sum()  # noqa: E731
    ahead = LookAhead(_local(weights), list(weights), ("first", "bias"), [[loss]], 0.1)
    found = [hypergradient(ahead, [lambda: _loss(weights, batches[0])], mode) for mode in bilevel.Mode.__args__]

    for other in found[1:]:
        assert all(torch.allclose(found[0][n], other[n], atol=1e-8) for n in weights)


@pytest.mark.parametrize("is_held", [False, True], ids=["start", "reference"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("lower", [("first", "second", "bias"), ("first", "bias")])
def test_merged_hypergradient_equals_autograd_through_merge(lower, steps, is_held):
    """Two branches from one start; the first layer by projections, the rest averaged; against one call of autograd."""
    weights, batches = _toy()
    words = [batches[0][:1], batches[1][:2]]
    merge = Merge.solve(words, torch.cat(batches))
    reference = {"first": weights["first"].detach() + 0.1} if is_held else None
    data = [[batches[n] + 0.1 * k for k in range(steps)] for n in range(2)]
    local = _local(weights)
    branches = [
        LookAhead(local, list(weights), lower, [[lambda b=b: _loss(weights, b)] for b in mine], 0.1) for mine in data
    ]
    merging = LayerMerging(merge, frozenset({"first"}), reference)
    found = {
        mode: bilevel.merged_hypergradient(branches, merging, [lambda: _loss(weights, batches[3])], mode)
        for mode in bilevel.Mode.__args__
    }

    adapted = []
    for mine in data:
        moved = dict(weights)
        for batch in mine:
            slopes = torch.autograd.grad(_loss(moved, batch), [moved[n] for n in lower], create_graph=True)
            moved |= {n: moved[n] - 0.1 * g for n, g in zip(lower, slopes, strict=True)}
        adapted.append(moved)
    merged = {n: (adapted[0][n] + adapted[1][n]) / 2 for n in weights}
    held = weights["first"] if reference is None else reference["first"]
    merged["first"] = merge(held, [a["first"] for a in adapted])
    unrolled = torch.autograd.grad(_loss(merged, batches[3]), list(weights.values()))

    for (name, value), expected in zip(found["exact"].items(), unrolled, strict=True):
        assert (value - expected).abs().max() < 1e-10
        assert (found["finite_difference"][name] - expected).norm() < 1e-6 * expected.norm()
    assert any((found["first_order"][n] - found["exact"][n]).abs().max() > 1e-3 for n in weights)


def _flat(vector) -> torch.Tensor:
    return torch.cat([v.flatten() for v in vector.values()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_modes_agree_on_a_unet(model, make_run, purse_files, checkpointing):
    """fp64: cosine above 0.9999, relative error below 1e-4; S_l is self-attention, S_u all attention."""
    from PIL import Image

    from harness.training import diffusion
    from harness.training.selection import select

    run = make_run()
    encoded = diffusion.encode_images(model, run, [Image.open(f) for f in purse_files], ["a purse"] * 4, flip=False)
    scheduler = model.noise_scheduler()
    unet = model.unet.double()
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    try:
        names = select(model.parameters(), "attention")
        parameters = {n: p for n, p in model.parameters().items() if n in names}
        lower = [n for n in names if "attn1" in n]

        def loss(step):
            drawn = diffusion.draw(encoded, 2, 1000, seed=3, step=step, device="cpu")
            noisy = scheduler.add_noise(drawn.latents, drawn.noise, drawn.timesteps).double()
            said = unet(noisy, drawn.timesteps, drawn.embeddings.double()).sample
            return (said - drawn.noise.double()).square().mean()

        ahead = LookAhead(LocalWeights(parameters, {}), names, lower, [[lambda: loss(0)]], 1.0)
        exact, difference, first = (
            _flat(hypergradient(ahead, [lambda: loss(1)], mode)) for mode in bilevel.Mode.__args__
        )
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval().float()

    assert torch.cosine_similarity(exact, difference, dim=0) > 0.9999
    assert (exact - difference).norm() < 1e-4 * exact.norm()
    assert (exact - first).norm() > 1e-3 * exact.norm()  # the second order is not nothing here
