"""Merge: one weight that maps each concept's words as that concept's own weight does, with little change elsewhere.

For one key or value projection W [out, in], concepts n with their own W_n, target words C_n [s_n, in] and
regularization words C_reg [R, in] (MIMA, Merge; Custom Diffusion's constrained merge):

    min over V   || (V - W) C_reg^T ||_F^2    so that    V C_n^T = W_n C_n^T   for every n

With A = C_reg^T C_reg, C all rows stacked, Q = (C A^-1 C^T)^-1 C A^-1 and P_n = C_n^T Q_n (Q_n: the rows of concept n)
the solution is linear in the weights (papers' facts: mima.md 2.3):

    Merge(W, W_1 .. W_N) = W (I - P) + sum_n W_n P_n,     P = sum_n P_n,  P P = P

P_n depends only on the words, so it is computed once, in fp64, and shared by all layers and steps; the backward pass is
two matrix products, with no solver in the graph.

Rules for cases that the papers do not treat: a row that depends linearly on earlier rows (up to `TOLERANCE` of its
length, in the metric of A^-1) is left out, so the earlier concept decides for shared words; the released code does so
only for bit-identical rows. A gets a ridge of `RIDGE` times its mean eigenvalue, as C_reg may have fewer rows than
columns; the constraints still hold exactly. The released code has no rule for nearly dependent rows: it inverts the
matrix as given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from harness.model.transfer import to_device

TOLERANCE = 1e-6
RIDGE = 1e-6


@dataclass(frozen=True)
class Merge:
    """The fixed linear map; weights may have any floating dtype, and gradients flow through it."""

    projections: tuple[Tensor, ...]  # P_n [in, in], fp64
    kept: tuple[tuple[int, ...], ...]  # per concept: indices of its constrained rows

    @classmethod
    def solve(
        cls, targets: Sequence[Tensor], regularization: Tensor, ridge: float = RIDGE, constraint_ridge: float = 0.0
    ) -> Merge:
        """Return the map for `targets` C_n [s_n, in] and `regularization` C_reg [R, in].

        `ridge` is added to A and `constraint_ridge` to M = C A^-1 C^T, each times the matrix's mean eigenvalue. With
        `constraint_ridge` above zero, the constraints hold only approximately, and P P = P does not hold.

        Raises ValueError if there are no concepts, widths differ, values are not finite, or all rows of a concept
        depend on those of earlier concepts.
        """
        width = regularization.shape[1]
        if not targets or any(t.ndim != 2 or t.shape[1] != width for t in targets):
            raise ValueError(f"merge needs targets [rows, {width}], got {[tuple(t.shape) for t in targets]}")
        if not all(bool(t.isfinite().all()) for t in (*targets, regularization)):
            raise ValueError("merge needs finite words")
        reference = regularization.detach().double()
        gram = reference.T @ reference
        scale = float(gram.diagonal().mean()) or 1.0
        gram = gram + ridge * scale * torch.eye(width, dtype=torch.float64, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise ValueError(f"{len(reference)} regularization words do not span {width} dimensions; give a ridge")
        rows = torch.cat([t.detach().double() for t in targets])
        # whitened rows: rows @ A^-1 @ rows.T is white @ white.T
        white = torch.linalg.solve_triangular(factor, rows.T, upper=False).T
        free = _independent(white)
        owners = [n for n, t in enumerate(targets) for _ in range(len(t))]
        starts = [sum(len(t) for t in targets[:n]) for n in range(len(targets))]
        kept = tuple(tuple(i - starts[n] for i in free if owners[i] == n) for n in range(len(targets)))
        if not all(kept):
            what = f"concept {kept.index(()) + 1} of {len(targets)} shares all its words with those before"
            raise ValueError(f"{what}: {len(rows)} words in {width} dimensions; give fewer or other prompts")
        # with B the kept rows, whitened: Q = (B B^T)^-1 B L^-1, A = L L^T
        kept_rows = white[free]
        inverse = torch.linalg.pinv(kept_rows.T)
        if constraint_ridge:
            gram = kept_rows @ kept_rows.T
            gram.diagonal().add_(constraint_ridge * gram.diagonal().mean())
            inverse = torch.linalg.solve(gram, kept_rows)
        q = torch.linalg.solve_triangular(factor, inverse, upper=False, left=False)
        place = {row: index for index, row in enumerate(free)}
        projections = []
        for n, start in enumerate(starts):
            mine = [place[start + i] for i in kept[n]]
            projections.append(rows[[start + i for i in kept[n]]].T @ q[mine])
        return cls(tuple(projections), kept)

    def __call__(self, weight: Tensor, adapted: Sequence[Tensor]) -> Tensor:
        """Return Merge(W, W_1 .. W_N) [out, in]; differentiable with respect to all of them."""
        merged = weight
        for own, projection in zip(adapted, self.projections, strict=True):
            merged = merged + (own - weight) @ projection.to(weight)
        return merged

    def to(self, device) -> Merge:
        """Return the same map with its matrices on a device."""
        return Merge(tuple(to_device(p, device) for p in self.projections), self.kept)

    def pull_back(self, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients with respect to W and each W_n, from that with respect to the merged weight."""
        adapted = [cotangent @ projection.to(cotangent).T for projection in self.projections]
        return cotangent - sum(adapted), adapted


def _products(values: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
    return {name: value @ matrix.to(value) for name, value in values.items()}


@dataclass(frozen=True)
class LayerMerging:
    """Merge of whole models: key and value projections by `Merge`, every other parameter by the mean over concepts.

    The released code takes the mean of gradients, which is the same for SGD steps (papers' facts: the paper's own rule
    was not found). A `bilevel.Merging`.
    `reference`: weights that Merge stays close to, instead of the start weights (MIMA's text does not say which).
    `multiply`: computes weight @ matrix for each weight, whole or partitioned (`Weights.multiply`).
    """

    merge: Merge
    projections: frozenset[str]  # names of key and value projections
    reference: Mapping[str, Tensor] | None = None
    multiply: Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]] = _products

    @property
    def count(self) -> int:
        """The number of branches."""
        return len(self.merge.projections)

    def from_start(self, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return W (I - P) of each projection, zero for the others; overwrites `start`."""
        held = {
            n: w if self.reference is None else self.reference[n] for n, w in start.items() if n in self.projections
        }
        taken = self.multiply(held, self._total)
        return {n: held[n] - taken[n] if n in held else value.zero_() for n, value in start.items()}

    def add_adapted(self, total: dict[str, Tensor], index: int, adapted: dict[str, Tensor]) -> None:
        """Add W_n P_n of each projection, W_n / N of the others; empties `adapted`."""
        products = self.multiply(
            {n: w for n, w in adapted.items() if n in self.projections}, self.merge.projections[index]
        )
        for name in list(adapted):
            value = adapted.pop(name)
            sum_so_far = total[name].to(value.device)  # it may wait in main memory
            if name in products:
                sum_so_far += products[name]
            else:
                sum_so_far.add_(value, alpha=1 / self.count)
            total[name].copy_(sum_so_far)

    def to_start(self, cotangent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return G (I - P)^T of each projection (zero if there is a `reference`), zero for the others."""
        free = {n: g for n, g in cotangent.items() if self.reference is None and n in self.projections}
        taken = self.multiply(free, self._total.T)
        return {n: g - taken[n] if n in free else torch.zeros_like(g) for n, g in cotangent.items()}

    def to_adapted(self, cotangent: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield for each branch G P_n^T of each projection, G / N of the others, the same tensors for all; empties G.

        The others are divided in place: a second vector over all weights would be as large as the model.
        """
        inside = {n: cotangent.pop(n) for n in list(cotangent) if n in self.projections}
        shared = {n: cotangent.pop(n).div_(self.count) for n in list(cotangent)}
        for projection in self.merge.projections:
            yield {**shared, **self.multiply(inside, projection.T)}

    @cached_property
    def _total(self) -> Tensor:
        return sum(self.merge.projections)


def _independent(rows: Tensor) -> list[int]:
    """Return the indices of rows [S, D] independent of earlier rows, by Gram-Schmidt, applied twice for accuracy."""
    basis: list[Tensor] = []
    kept = []
    for index, row in enumerate(rows):
        rest = row.clone()
        for _ in range(2):
            if basis:
                known = torch.stack(basis)
                rest = rest - known.T @ (known @ rest)
        length = float(rest.norm())
        if length > TOLERANCE * float(row.norm()):
            basis.append(rest / length)
            kept.append(index)
    return kept
