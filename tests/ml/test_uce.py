"""UCE: the closed form, its limits, and the released code's choice of text vectors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from defenses.uce import Parameters, Uce
from harness.contracts.defense import ProtectedConcept
from harness.training.closed_form import Edit, aligned, kept_texts, last_subject_token
from harness.training.selection import select


def _edit(model, run, targets=("van gogh",), preserved=(), **changes):
    defense = Uce(dataclasses.replace(Parameters(), **changes))
    concepts = [ProtectedConcept("style", t) for t in targets]
    kept = [ProtectedConcept("style", t) for t in preserved]
    return defense.protect(model, concepts, kept, run).tensors


def _aligned(model, text, guide):
    edit = aligned(model, text, guide)
    return edit.concept, edit.guide


def test_only_cross_attention_keys_and_values_change(model, make_run):
    """32 tensors on SD 1.x; here two for each transformer block."""
    edited = _edit(model, make_run())

    assert set(edited) == set(select(model.parameters(), "cross_attention_kv"))


def test_edited_matrices_solve_the_normal_equations(model, make_run):
    """W M = lambda W0 + e sum v c^T + p sum W0 c c^T, built here by explicit sums."""
    edited = _edit(model, make_run(), preserved=("monet",), ridge=0.5)
    concept, guide = _aligned(model, "van gogh", " ")
    kept = model.encode_text(["", "monet"]).double().flatten(0, 1)
    p = max(0.1, 1 / 2)
    for name, new in edited.items():
        old = model.parameters()[name].detach().double()
        gram = 0.5 * torch.eye(old.shape[1], dtype=torch.float64)
        right = 0.5 * old
        for c, g in zip(concept, guide, strict=True):
            gram += torch.outer(c, c)
            right += torch.outer(old @ g, c)
        for c in kept:
            gram += p * torch.outer(c, c)
            right += p * torch.outer(old @ c, c)
        residual = (new.double() @ gram - right).norm() / right.norm()

        assert residual < 1e-5


def test_small_ridge_maps_the_concept_onto_its_guide(model, make_run):
    """lambda -> 0 with fewer vectors than dimensions: W c = v*. A text of full length leaves two vectors to edit."""
    text = " ".join("abcdefghij" * 8)
    edited = _edit(model, make_run(), targets=(text,), ridge=1e-6, preserve_scale=1e-6)
    concept, guide = _aligned(model, text, " ")

    assert len(concept) == 2
    for name, new in edited.items():
        old = model.parameters()[name].detach().double()
        before = (concept @ old.T - guide @ old.T).norm()
        after = (concept @ new.double().T - guide @ old.T).norm()

        assert after < 1e-3 * before


def test_large_ridge_changes_nothing(model, make_run):
    """lambda -> infinity: W = W0."""
    for name, new in _edit(model, make_run(), ridge=1e6).items():
        assert torch.allclose(new, model.parameters()[name], atol=1e-3)


def test_order_of_the_concepts_does_not_matter(model, make_run):
    """One joint solve."""
    first = _edit(model, make_run(), targets=("van gogh", "monet"))
    second = _edit(model, make_run(), targets=("monet", "van gogh"))

    assert all(torch.allclose(first[n], second[n], atol=1e-5) for n in first)


def test_preserved_texts_keep_their_outputs_better(model, make_run):
    """Naming a text under preserve shrinks what the edit does to it."""

    def damage(**options):
        kept = model.encode_text(["a red boat"]).double()[0]
        edited = _edit(model, make_run(), **options)
        return sum(
            (kept @ (new.double() - model.parameters()[name].detach().double()).T).norm()
            for name, new in edited.items()
        )

    assert damage(preserve=("a red boat",), preserve_scale=100.0) < 0.5 * damage(preserve_scale=0.1)


def test_preserved_concepts_may_be_left_alone(model, make_run):
    """FreezeAsGuard's own tool preserves the empty prompt alone, at scale 1."""
    alone = _edit(model, make_run(), preserve_scale=1.0)
    left = _edit(model, make_run(), preserved=("monet",), preserve_concepts=False)
    kept = _edit(model, make_run(), preserved=("monet",))

    assert all(torch.equal(left[name], alone[name]) for name in alone)
    assert any(not torch.equal(kept[name], alone[name]) for name in alone)
    assert Uce.used(Parameters()) == {"targets", "preserved"}
    assert Uce.used(Parameters(preserve_concepts=False)) == {"targets"}


@pytest.mark.parametrize(("text", "index"), [("", 0), (" ", 0), ("a", 1), ("a b", 2)])
def test_last_subject_token_is_the_one_before_the_end(model, text, index):
    """Start token, one token a letter here, end token."""
    assert last_subject_token(model, text) == index


def test_aligned_slices_have_equal_length_and_spare_the_start_token(model):
    """Both run from their last subject token; the concept's never includes index 0."""
    concept, guide = _aligned(model, "a b c", " ")
    tokens = model.tokenizer.model_max_length
    whole = model.encode_text(["a b c"]).double()[0]

    assert concept.shape == guide.shape == (tokens - 3, whole.shape[1])
    assert torch.equal(concept, whole[3:])


def test_tensor_technique_removes_the_part_along_the_old_output(model, make_run):
    """v* is orthogonal (Frobenius) to W0 c_old."""
    concept, guide = _aligned(model, "van gogh", " ")
    weight = next(iter(model.parameters()[n] for n in select(model.parameters(), "cross_attention_kv"))).double()
    wanted = Edit(concept, guide).wanted(weight, "tensor")

    assert abs(float((wanted * (concept @ weight.T)).sum())) < 1e-8


def test_commas_belong_to_a_name(model, make_run):
    """The released parser would cut this into two concepts."""
    joined = _edit(model, make_run(), targets=("a,b",))
    split = _edit(model, make_run(), targets=("a", "b"))

    assert any(not torch.allclose(joined[n], split[n]) for n in joined)


def test_tensor_technique_treats_each_concept_by_itself(model, make_run):
    """Two targets: the part that is removed is along each concept's own old output, not along both together."""
    edited = _edit(model, make_run(), targets=("van gogh", "monet"), technique="tensor", ridge=0.5)
    slices = [_aligned(model, text, " ") for text in ("van gogh", "monet")]
    kept = model.encode_text([""]).double()[0]
    for name, new in edited.items():
        old = model.parameters()[name].detach().double()
        gram = 0.5 * torch.eye(old.shape[1], dtype=torch.float64) + kept.T @ kept
        right = 0.5 * old + old @ kept.T @ kept
        for concept, guide in slices:
            current, target = concept @ old.T, guide @ old.T
            unit = current / current.norm()
            gram += concept.T @ concept
            right += (target - (unit * target).sum() * unit).T @ concept

        assert (new.double() @ gram - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize(
    ("left_out", "kept"),
    [
        ("equal", ["carpet", "a red car", "Carla", "a picture of car", "sports car"]),
        ("naming", ["carpet", "Carla"]),
    ],
)
def test_only_erased_texts_are_not_preserved(left_out, kept):
    """The released code: `text.lower() not in old_texts_lower`. A target "car" says nothing about a carpet."""
    texts = ["carpet", "Car", "CAR", "a red car", "Carla", "A photo of CAR", "a picture of car", "sports car"]

    assert kept_texts(texts, ["car", "a photo of car"], ["car"], left_out) == kept


def test_preserved_text_inside_which_a_targets_letters_occur_is_preserved(model, make_run):
    """As with a target that shares no letters with it;"""
    kept = _edit(model, make_run(), targets=("car",), preserve=("carpet",), preserve_scale=100.0)
    gone = _edit(model, make_run(), targets=("car",), preserve=("CAR",), preserve_scale=100.0)
    alone = _edit(model, make_run(), targets=("car",), preserve_scale=100.0)

    assert all(torch.equal(gone[name], alone[name]) for name in alone)
    assert any(not torch.equal(kept[name], alone[name]) for name in alone)
