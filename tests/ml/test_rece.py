"""RECE: what its rounds solve, against sums in plain torch, and what they leave alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from defenses.rece import Parameters, Rece
from defenses.uce import Uce
from harness.contracts.defense import ProtectedConcept
from harness.training import closed_form
from harness.training.selection import select


def _edit(model, run, targets=("van gogh",), cls=Rece, **changes):
    defense = cls(dataclasses.replace(cls.Parameters(), **changes))
    return defense.protect(model, [ProtectedConcept("style", t) for t in targets], [], run).tensors


def _originals(model):
    return {n: model.parameters()[n].detach().double() for n in select(model.parameters(), "cross_attention_kv")}


def _by_sums(old, concepts, guides, kept, ridge, preserve):
    """Return UCE's edit of one matrix from sums over single vectors, by an inverse."""
    gram = ridge * torch.eye(old.shape[1], dtype=torch.float64)
    right = ridge * old
    for c, g in zip(concepts, guides, strict=True):
        gram, right = gram + torch.outer(c, c), right + torch.outer(old @ g, c)
    for c in kept:
        gram, right = gram + preserve * torch.outer(c, c), right + preserve * torch.outer(old @ c, c)
    return right @ torch.linalg.inv(gram)


@pytest.mark.parametrize("targets", [("van gogh",), ("van gogh", "monet")])
def test_two_rounds_equal_the_released_loop_in_plain_torch(model, make_run, targets):
    """UCE, then c' over all matrices together and the edit of c' from the weights before the round, twice."""
    found = _edit(model, make_run(), targets, rounds=2, penalty=0.3, round_ridge=0.2, round_preserve_scale=0.4)
    originals = _originals(model)
    kept = model.encode_text([""]).double()[0]
    states = [model.encode_text([text]).double()[0] for text in targets]
    guide = model.encode_text([" "]).double()[0]
    # from the last subject token on: one token a letter here, and the guide " " has none
    cuts = [len(text.replace(" ", "")) for text in targets]
    first = torch.cat([s[cut:] for s, cut in zip(states, cuts, strict=True)])
    towards = torch.cat([guide[: len(guide) - cut] for cut in cuts])
    weights = {n: _by_sums(w, first, towards, kept, 0.5, 1.0) for n, w in originals.items()}
    for _ in range(2):
        gram = 0.3 * torch.eye(kept.shape[1], dtype=torch.float64) + sum(w.T @ w for w in weights.values())
        mixed = sum(w.T @ originals[n] for n, w in weights.items())
        recalled = torch.cat([torch.stack([torch.linalg.inv(gram) @ mixed @ c for c in s]) for s in states])
        guides = torch.cat([guide] * len(targets))
        weights = {n: _by_sums(w, recalled, guides, kept, 0.2, 0.4) for n, w in weights.items()}

    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert (value.double() - weights[name]).norm() < 1e-5 * weights[name].norm()


def test_recalled_vectors_minimize_their_objective(model):
    """Its gradient by autograd is zero there."""
    originals = _originals(model)
    edit = closed_form.whole(model, "van gogh", " ")
    weights = {name: weight + 0.1 * weight.roll(1, 0) for name, weight in originals.items()}
    (found,) = closed_form.recalled(originals, weights, [edit.concept], 0.1)
    rows = found.clone().requires_grad_(True)

    def objective(rows):
        distances = sum((rows @ w.T - edit.concept @ originals[n].T).square().sum() for n, w in weights.items())
        return distances + 0.1 * rows.square().sum()

    (slope,) = torch.autograd.grad(objective(rows), rows)
    (elsewhere,) = torch.autograd.grad(objective(edit.concept.requires_grad_(True)), edit.concept)

    assert slope.norm() < 1e-10 * elsewhere.norm()


def test_of_an_unedited_model_the_concept_itself_is_recalled(model):
    """W = W* and a small penalty, where the projections together see every direction."""
    originals = _originals(model)
    edit = closed_form.whole(model, "van gogh", " ")
    (found,) = closed_form.recalled(originals, originals, [edit.concept], 1e-9)

    assert (found - edit.concept).norm() < 1e-5 * edit.concept.norm()


def test_a_great_penalty_leaves_the_first_edit(model, make_run):
    """c' -> 0 as 1 / lambda: there is nothing to map, and the ridge pulls to the weights before the round."""
    first = _edit(model, make_run(), cls=Uce)

    def change(penalty):
        rece = _edit(model, make_run(), penalty=penalty, rounds=1)
        return sum((rece[name] - value).norm() for name, value in first.items())

    assert change(1e6) < 0.11 * change(1e5) < 0.1 * change(0.1)


def test_a_round_takes_away_what_the_first_edit_left(model, make_run):
    """After it the vectors that recalled the concept from UCE's model answer more like the guide."""
    originals = _originals(model)
    edit = closed_form.whole(model, "van gogh", " ")
    first = {n: w.double() for n, w in _edit(model, make_run(), cls=Uce).items()}
    (recalled,) = closed_form.recalled(originals, first, [edit.concept], 0.1)
    after = _edit(model, make_run(), rounds=1, penalty=0.1)

    def distance(weights):
        return sum((recalled @ w.double().T - edit.guide @ first[n].T).square().sum() for n, w in weights.items())

    assert distance(after) < 0.1 * distance(first)


def test_defaults_are_the_example_of_the_readme():
    """Nudity: three rounds at 0.1, with 0.1 for both scales of Eq. 3, after UCE at its own."""
    p = Parameters()

    assert (p.rounds, p.penalty, p.round_ridge, p.round_preserve_scale) == (3, 0.1, 0.1, 0.1)
    assert (p.ridge, p.erase_scale, p.guide) == (0.5, 1.0, " ")
