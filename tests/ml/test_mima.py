"""MIMA: one round against a round written out, what changes, and profiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from torch.func import functional_call

from defenses.mima import Mima, Parameters
from harness.contracts.defense import ProtectedConcept
from harness.training import diffusion
from harness.training.selection import select

CAPTIONS = ["a dog on a beach", "an old house by the river", "two cups of tea", "a red car in the snow"]


@pytest.fixture
def captions(tmp_path):
    """A small C_reg."""
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS), encoding="utf-8")
    return str(path)


@pytest.fixture
def concepts(tiny_folder):
    """Two concepts of four images each, with two class images."""
    files = [tuple(sorted((tiny_folder / name).glob("*.png"))[:4]) for name in ("purse", "cat")]
    prior = tuple(sorted((tiny_folder / "purse").glob("*.png"))[5:7])
    return [
        ProtectedConcept("object", "purse", ("a photo of a purse",) * 4, files[0], ("object",) * 2, prior),
        ProtectedConcept("object", "cat", ("a photo of a cat",) * 4, files[1], ("object",) * 2, prior),
    ]


def _protect(model, run, concepts, captions, **changes):
    options = {
        "rounds": 2,
        "batch_size": 2,
        "lower_learning_rate": 0.5,
        "upper_learning_rate": 1e-3,
        "regularization_captions": captions,
        "ridge": 1e-3,
    }
    defense = Mima(dataclasses.replace(Parameters(), **options | changes))
    return defense.protect(model, concepts, concepts[:1], run).tensors


def _merge_directly(model, concepts, ridge: float):
    """Return a function Merge(W, [W_n]) that solves the constrained least squares by Lagrange's equations."""

    def words(texts):
        rows = []
        for text in dict.fromkeys(texts):
            tokens = model.tokenizer(text, return_tensors="pt").input_ids
            with torch.no_grad():
                rows.append(model.text_encoder(tokens)[0][0, 1:].double())
        return torch.cat(rows)

    per_concept = [words(c.captions) for c in concepts]
    reference = words(CAPTIONS)
    gram = reference.T @ reference
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    # rows that do not depend on earlier ones, by rank
    kept, owners = [], []
    for owner, rows in enumerate(per_concept):
        for row in rows:
            if torch.linalg.matrix_rank(torch.stack([*kept, row]), rtol=1e-6) > len(kept):
                kept.append(row)
                owners.append(owner)
    constraint = torch.stack(kept)
    count = len(kept)

    def merge(weight, adapted):
        outputs = torch.stack([row @ adapted[o].double().T for row, o in zip(kept, owners, strict=True)])
        system = torch.cat(
            [
                torch.cat([2 * gram, constraint.T], 1),
                torch.cat([constraint, torch.zeros(count, count, dtype=torch.float64)], 1),
            ]
        )
        right = torch.cat([2 * gram @ weight.double().T, outputs])
        return torch.linalg.solve(system, right)[: len(gram)].T.to(weight.dtype)

    return merge


@pytest.mark.parametrize("mode", ["exact", "finite_difference", "first_order"])
def test_a_round_is_algorithm_1_written_out(model, make_run, concepts, captions, mode):
    """Look-aheads, Merge and the loss after them in one graph, differentiated by one call of autograd."""
    run = make_run(3)
    ours = _protect(model, run, concepts, captions, rounds=1, hypergradient=mode)
    model.restore()

    names = {n.removeprefix("unet."): p for n, p in model.parameters().items() if n.startswith("unet.")}
    lower = {n: p.detach().clone().requires_grad_() for n, p in names.items()}
    projections = {n.removeprefix("unet.") for n in select(model.parameters(), "cross_attention_kv")}
    upper = [n.removeprefix("unet.") for n in select(model.parameters(), "cross_attention")]
    merge = _merge_directly(model, concepts, 1e-3)
    scheduler = model.noise_scheduler()

    def loss(weights, index, step):
        target = concepts[index]
        encoded = diffusion.encode_images(model, run, [Image.open(f) for f in target.files], target.captions, flip=True)
        seed = run.seed_for("noise", index)
        batch = diffusion.draw(encoded, 2, 1000, seed=seed, step=step, device="cpu")
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        said = functional_call(model.unet, weights, (noisy, batch.timesteps, batch.embeddings)).sample
        return (said - batch.noise).square().mean()

    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        adapted = []
        for index in range(2):
            slopes = torch.autograd.grad(
                loss(lower, index, 0), list(lower.values()), create_graph=mode != "first_order"
            )
            adapted.append({n: p - 0.5 * g for (n, p), g in zip(lower.items(), slopes, strict=True)})
        merged = {
            n: merge(lower[n], [a[n] for a in adapted]) if n in projections else (adapted[0][n] + adapted[1][n]) / 2
            for n in lower
        }
        outer = -(loss(merged, 0, 1) + loss(merged, 1, 1)) / 2
        slopes = torch.autograd.grad(outer, [lower[n] for n in upper])
    optimizer = torch.optim.AdamW([lower[n] for n in upper], lr=1e-3, weight_decay=1e-2)
    before = {n: lower[n].detach().clone() for n in upper}
    for name, slope in zip(upper, slopes, strict=True):
        lower[name].grad = slope
    optimizer.step()

    moved = torch.cat([(lower[n] - before[n]).flatten() for n in upper])
    apart = torch.cat([(ours[f"unet.{n}"] - lower[n]).flatten() for n in upper])
    # AdamW's first step is a sign: the few weights whose gradient is rounding noise may go either way
    assert (apart.abs() > 0.1e-3).float().mean() < 0.01
    assert torch.cosine_similarity(moved, moved + apart, dim=0) > 0.99


@pytest.mark.parametrize("profile", ["paper", "released"])
def test_only_the_upper_set_is_released(model, make_run, concepts, captions, profile):
    """S^u is cross-attention; what the released loop's lower level moves besides is thrown away."""
    before = {n: p.detach().clone() for n, p in model.parameters().items()}
    tensors = _protect(model, make_run(), concepts, captions, profile=profile)

    assert set(tensors) == set(select(before, "cross_attention"))
    assert any(not torch.equal(tensors[n], before[n]) for n in tensors)
    drifted = any(
        not torch.equal(p, before[n])
        for n, p in model.parameters().items()
        if n.startswith("unet.") and n not in tensors
    )
    assert drifted == (profile == "released")


def test_paper_profile_leaves_no_look_ahead_behind(model, make_run, concepts, captions):
    """Without an upper step that matters the weights are what they were: the lower level is virtual."""
    before = {n: p.detach().clone() for n, p in model.parameters().items()}
    tensors = _protect(model, make_run(), concepts, captions, upper_learning_rate=1e-30, weight_decay=0.0)

    assert all(torch.equal(tensors[n], before[n]) for n in tensors)


def _each(model, make_run, concepts, captions, *settings):
    results = []
    for index, changes in enumerate(settings):
        seed = changes.pop("seed", 1)
        results.append(_protect(model, make_run(seed, f"run{index}"), concepts, captions, **changes))
        model.restore()
    return results


def _same(first, second) -> bool:
    return all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"grad_through_merge": False, "hypergradient": "first_order"},
        {"hypergradient": "first_order"},
        {"lower_persist": True, "grad_through_merge": False, "hypergradient": "first_order"},
        {"prior_on_upper": 1.0},
        {"prior_on_lower": 1.0},
        {"prior_on_upper": 1.0, "prior_from": "preserved"},
        {"clip_norm": 1e-3, "rounds": 3},
        {"lower_steps": 2},
        {"lower_parameters": "cross_attention_kv"},
        {"upper_parameters": "attention"},
        {"constraint_ridge": 0.5},
        {"concept_prompts": ("{}",)},
        {"concept_key": "class"},
        {"regularization_count": 2},
        {"regularization": "resample", "regularization_count": 2},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_switch_does_something(model, make_run, concepts, captions, changes):
    """And the same settings give the same weights, bit for bit."""
    plain, again, other = _each(model, make_run, concepts, captions, {}, {}, dict(changes))

    assert _same(plain, again)
    assert set(other) != set(plain) or not _same(plain, other)


def test_merge_base_matters_once_weights_have_moved(model, make_run, concepts, captions):
    """In the first round both bases are the same weights; what differs there is the gradient alone."""
    plain = {"grad_through_merge": False, "hypergradient": "first_order", "lower_learning_rate": 5.0}
    first, second = (
        _each(
            model,
            make_run,
            concepts,
            captions,
            *({"merge_base": base, "rounds": rounds, **plain} for base in ("current", "pretrained")),
        )
        for rounds in (1, 3)
    )

    assert _same(*first)
    assert not _same(*second)


def test_class_key_trains_only_the_last_concept_of_a_class(model, make_run, concepts, captions):
    """The released code's collapse: with one class prompt for both, the first concept might as well not be there."""
    both, alone = (
        _protect(model, make_run(1, f"run{index}"), chosen, captions, profile="released", concept_key="class")
        for index, chosen in enumerate((concepts, concepts[1:]))
        if model.restore() is None
    )

    assert _same(both, alone)


@pytest.mark.parametrize(
    "changes",
    [{"lower_persist": True}, {"grad_through_merge": False}, {"profile": "released", "hypergradient": "exact"}],
    ids=str,
)
def test_settings_that_do_not_fit_together_are_refused(changes):
    """Before any compute."""
    with pytest.raises(ValueError, match="hypergradient"):
        Parameters(**changes)


def test_micro_batches_and_gradient_checkpointing_change_memory_only(model, make_run, concepts, captions):
    """To the order of sums."""
    from harness.core.sharding import Sharding

    results = []
    for index, sharding in enumerate((Sharding(), Sharding(micro_batch_size=1, gradient_checkpointing=True))):
        run = make_run(1, f"run{index}")
        run.sharding = sharding
        results.append(_protect(model, run, concepts, captions, hypergradient="first_order"))
        model.restore()

    start = {n: p for n, p in model.parameters().items() if n in results[0]}
    moved, apart = (torch.cat([(a[n] - b[n]).flatten() for n in a]) for a, b in ((results[0], start), results))
    assert apart.norm() < 1e-2 * moved.norm()
