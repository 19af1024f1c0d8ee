"""Hypergradients: modes against each other, and against plain autograd on models small enough to write out."""

from __future__ import annotations

import contextlib
import weakref

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
    ours = hypergradient(ahead, ahead.adapted(), [lambda: _loss(weights, batches[3])], "exact")

    moved = dict(weights)
    for batch in batches[:steps]:
        slopes = torch.autograd.grad(_loss(moved, batch), [moved[n] for n in lower], create_graph=True)
        moved |= {n: moved[n] - 0.1 * g for n, g in zip(lower, slopes, strict=True)}
    unrolled = torch.autograd.grad(_loss(moved, batches[3]), list(weights.values()))

    for (name, value), expected in zip(ours.items(), unrolled, strict=True):
        assert (value - expected).abs().max() < 1e-10
        assert torch.equal(weights[name], before[name])


@pytest.mark.parametrize("mode", bilevel.Mode.__args__)
def test_merged_weights_are_gone_on_the_way_back(mode):
    """They are as large as S_l, and needed for the upper gradient alone."""
    weights, batches = _toy()
    local = _local(weights)
    branches = [LookAhead(local, list(weights), list(weights), [[lambda b=b: _loss(weights, b)]], 0.1) for b in batches]
    merging = LayerMerging(Merge.solve([b[:1] for b in batches], torch.cat(batches)), frozenset({"first"}))
    seen: list[weakref.ref] = []
    back: list[int] = []

    class Watched(LayerMerging):
        def from_start(self, start):
            total = super().from_start(start)
            seen.extend(weakref.ref(value) for value in total.values())
            return total

        def to_adapted(self, cotangent):
            for index, own in enumerate(super().to_adapted(cotangent)):
                assert all(ref() is None for ref in seen)
                back.append(index)
                yield own

    upper = [lambda: _loss(weights, batches[0])]
    watched = Watched(merging.merge, merging.projections)
    found = bilevel.merged_hypergradient(branches, watched, upper, mode)
    plain = bilevel.merged_hypergradient(branches, merging, upper, mode)

    assert len(seen) == len(weights) and back == [0, 1, 2, 3]
    assert all(torch.equal(found[name], plain[name]) for name in weights)


def test_modes_of_a_linear_lower_loss_agree():
    """Without curvature the first order is all there is."""
    weights, batches = _toy()
    loss = lambda: weights["first"].sum() + weights["bias"].sum()  # noqa: E731
    ahead = LookAhead(_local(weights), list(weights), ("first", "bias"), [[loss]], 0.1)
    upper = [lambda: _loss(weights, batches[0])]
    found = [hypergradient(ahead, ahead.adapted(), upper, mode) for mode in bilevel.Mode.__args__]

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


def test_the_end_of_a_look_ahead_can_be_settled_after_its_hypergradient():
    """It is theta_K again, bit for bit, when the gradient is known; the installed weights are those of the start."""
    weights, batches = _toy()
    start = {name: p.detach().clone() for name, p in weights.items()}
    losses = [[lambda b=b: _loss(weights, b)] for b in batches[:2]]
    ahead = LookAhead(_local(weights), list(weights), ("first", "bias"), losses, 0.1)
    adapted = ahead.adapted()
    end = {name: value.clone() for name, value in adapted.end.items()}
    hypergradient(ahead, adapted, [lambda: _loss(weights, batches[3])], "finite_difference")

    assert set(end) == {"first", "bias"}
    assert all(torch.equal(adapted.end[name], end[name]) and not torch.equal(end[name], start[name]) for name in end)
    assert all(torch.equal(weights[name], start[name]) for name in weights)


@pytest.mark.parametrize("steps", [1, 2])
def test_one_branchs_end_is_held_at_a_time(steps):
    """When a branch is merged, nothing is left of the end of the one before; of one step, nothing for the way back."""
    weights, batches = _toy()
    local = _local(weights)
    losses = [[lambda b=b: _loss(weights, b)] for b in batches[:steps]]
    branches = [LookAhead(local, list(weights), list(weights), losses, 0.1) for _ in range(3)]
    seen: list[weakref.ref] = []

    class Mean:
        def from_start(self, start):
            return {name: value.zero_() for name, value in start.items()}

        def add_adapted(self, total, index, adapted):
            assert all(ref() is None for ref in seen)
            seen.extend(weakref.ref(value) for value in adapted.values())
            for name, value in adapted.items():
                total[name] += value / 3

    found = bilevel.merged(branches, Mean())

    assert len(seen) == 3 * len(weights) and all(ref() is None for ref in seen)
    assert [[bool(vector) for vector in starts] for starts in found.starts] == [[False, True][:steps]] * 3


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient_checkpointing"])
@pytest.mark.parametrize("method", ["imma", "imma_same_weights", "mima"])
def test_modes_agree_on_a_unet(model, make_run, purse_files, method, checkpointing):
    """fp64: cosine above 0.9999, relative error below 1e-4, with S_l and S_u apart, overlapping, or one in the other.

    imma: S_l a LoRA adapter (with B not zero), S_u all attention; imma_same_weights: S_l self-attention; mima: two
    look-aheads of the whole UNet, merged, S_u cross-attention.
    """
    from harness.training import lora
    from harness.training.selection import select

    unet = model.unet
    upper = select(model.parameters(), "cross_attention" if method == "mima" else "attention")
    parameters = {n: p for n, p in model.parameters().items() if n.startswith("unet.")}
    with contextlib.ExitStack() as stack:
        if method == "imma":
            adapter = stack.enter_context(
                lora.injected(model, rank=2, alpha=2, target_modules=lora.ATTENTION_PROJECTIONS, seed=1)
            )
            source = torch.Generator().manual_seed(5)
            for name, factor in adapter.items():
                if "lora_B" in name:
                    factor.data = 0.1 * torch.randn(factor.shape, generator=source)
            parameters, lower = {n: parameters[n] for n in upper} | adapter, list(adapter)
        else:
            lower = select(parameters, "unet") if method == "mima" else [n for n in upper if "attn1" in n]
        unet.double()
        stack.callback(unet.float)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            stack.callback(unet.disable_gradient_checkpointing)
        names = list(dict.fromkeys([*lower, *upper]))
        weights = LocalWeights({n: parameters[n] for n in names}, {})

        def loss(seed):
            source = torch.Generator().manual_seed(seed)
            noise, start, states = (
                torch.randn(*shape, generator=source, dtype=torch.float64)
                for shape in ((2, 4, 8, 8), (2, 4, 8, 8), (2, 77, 32))
            )
            return [lambda: (unet(start + noise, torch.tensor([100, 700]), states).sample - noise).square().mean()]

        branches = [bilevel.LookAhead(weights, names, lower, [loss(n)], 0.3) for n in range(2)]
        words = [torch.randn(3, 32, generator=torch.Generator().manual_seed(9 + n)) for n in range(2)]
        merging = LayerMerging(
            Merge.solve(words, torch.randn(60, 32, generator=torch.Generator().manual_seed(8))),
            frozenset(select(parameters, "cross_attention_kv")),
        )
        found = {}
        for mode in bilevel.Mode.__args__:
            if method == "mima":
                vector = bilevel.merged_hypergradient(branches, merging, [*loss(7), *loss(8)], mode, wanted=upper)
            else:
                vector = hypergradient(branches[0], branches[0].adapted(), loss(7), mode)
            found[mode] = torch.cat([vector[name].flatten() for name in upper])
    exact, difference, first = (found[mode] for mode in ("exact", "finite_difference", "first_order"))
    print(f"{method}: {(exact - difference).norm() / exact.norm():.1e}")

    assert exact.dtype == torch.float64
    assert torch.cosine_similarity(exact, difference, dim=0) > 0.9999
    assert (exact - difference).norm() < 1e-4 * exact.norm()
    assert (exact - first).norm() > 1e-3 * exact.norm()  # the second order is not nothing here
