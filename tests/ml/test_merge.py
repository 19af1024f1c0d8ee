"""Merge of key and value projections: against the Lagrange equations, and what it does with words that depend."""

from __future__ import annotations

import pytest
import torch

from harness.training.merge import RIDGE, Merge

WIDTH, OUT = 12, 5


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(counts=(2, 3, 1), regularization=40):
    """Words of each concept, regularization words, the shared weight and each concept's own."""
    targets = [draw(count, WIDTH, seed=n) for n, count in enumerate(counts)]
    return targets, draw(regularization, WIDTH, seed=50), draw(OUT, WIDTH, seed=60), [
        draw(OUT, WIDTH, seed=70 + n) for n in range(len(counts))
    ]  # fmt: skip


def lagrange(targets, regularization, weight, own):
    """Solve the stationary and the constraint equations as one linear system, for all of V at once."""
    rows = torch.cat(targets)
    wanted = torch.cat([t @ w.T for t, w in zip(targets, own, strict=True)])
    gram = regularization.T @ regularization
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    count = len(rows)
    system = torch.zeros(WIDTH + count, WIDTH + count, dtype=torch.float64)
    system[:WIDTH, :WIDTH], system[:WIDTH, WIDTH:], system[WIDTH:, :WIDTH] = gram, rows.T, rows
    return torch.linalg.solve(system, torch.cat([gram @ weight.T, wanted]))[:WIDTH].T


@pytest.mark.parametrize("counts", [(2, 3, 1), (1,), (4, 4)])
def test_merge_solves_the_constrained_least_squares(counts):
    """Stationary point and constraints, solved directly in fp64."""
    targets, regularization, weight, own = case(counts)
    merged = Merge.solve(targets, regularization)(weight, own)

    assert (merged - lagrange(targets, regularization, weight, own)).abs().max() < 1e-9
    for words, mine in zip(targets, own, strict=True):
        assert (words @ merged.T - words @ mine.T).abs().max() < 1e-10


def test_no_solution_is_closer_to_the_old_weight():
    """Moving along any direction that keeps the constraints makes the regularization words worse."""
    targets, regularization, weight, own = case()
    merged = Merge.solve(targets, regularization)(weight, own)
    rows = torch.cat(targets)
    free = torch.eye(WIDTH, dtype=torch.float64) - torch.linalg.pinv(rows) @ rows

    def cost(candidate):
        return ((candidate - weight) @ regularization.T).square().sum()

    for seed in range(5):
        assert cost(merged + 1e-2 * draw(OUT, WIDTH, seed=200 + seed) @ free) > cost(merged)


def test_projections_sum_to_an_idempotent_map_of_the_rank_of_the_words():
    """P P = P; with W_n = W nothing changes."""
    targets, regularization, weight, _ = case()
    merge = Merge.solve(targets, regularization)
    total = sum(merge.projections)

    assert (total @ total - total).abs().max() < 1e-10
    assert torch.linalg.matrix_rank(total) == 6
    assert (merge(weight, [weight] * 3) - weight).abs().max() == 0.0


def test_gradients():
    """Autograd through the map, and `pull_back`, against differences."""
    targets, regularization, weight, own = case()
    merge = Merge.solve(targets, regularization)
    inputs = [weight.requires_grad_(), *(w.requires_grad_() for w in own)]
    assert torch.autograd.gradcheck(lambda w, *rest: merge(w, rest), inputs)

    cotangent = draw(OUT, WIDTH, seed=9)
    expected = torch.autograd.grad((merge(weight, own) * cotangent).sum(), inputs)
    base, adapted = merge.pull_back(cotangent)
    for found, right in zip([base, *adapted], expected, strict=True):
        assert (found - right).abs().max() < 1e-12


@pytest.mark.parametrize("regularization", [40, 3])
def test_words_that_depend_on_earlier_ones_are_left_to_the_earlier_concept(regularization):
    """A row that stands twice, a multiple of one, a sum of two; also with fewer regularization words than columns."""
    targets, words, weight, own = case((3, 2), regularization)
    first, second = targets
    repeated = torch.stack([first[0], second[0], 2 * first[1], first[0] + second[0], second[1]])
    merge = Merge.solve([first, repeated], words)
    merged = merge(weight, own)

    assert merge.kept == ((0, 1, 2), (1, 4))
    assert bool(merged.isfinite().all())
    assert (first @ merged.T - first @ own[0].T).abs().max() < 1e-7
    assert (second @ merged.T - second @ own[1].T).abs().max() < 1e-7


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([], "needs targets"),
        ([torch.ones(2, WIDTH - 1)], "needs targets"),
        ([torch.full((1, WIDTH), torch.nan)], "finite"),
        ([torch.ones(1, WIDTH), 2 * torch.ones(1, WIDTH)], "concept 2 of 2 shares all its words"),
    ],
)
def test_words_that_cannot_be_merged_are_refused(targets, words):
    """Told, not inverted."""
    with pytest.raises(ValueError, match=words):
        Merge.solve(targets, draw(20, WIDTH))
