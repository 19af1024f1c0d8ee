"""Hypergradients: the gradient of an upper loss, evaluated after lower-level steps, with respect to the start weights.

    theta_0 = theta,   theta_{k+1} = theta_k - alpha * grad L_k(theta_k)  on S_l,   k = 0 .. K-1
    wanted: d/dtheta U(theta_K)

With v_K = grad U(theta_K), the chain rule backwards through the steps is

    v_k = v_{k+1} - alpha * H_k v_{k+1}|S_l,     H_k = Hessian of L_k at theta_k

and v_0 is the hypergradient. `mode` selects how H v is computed:

    exact              reverse over reverse, at the cost of a double backward; not for partitioned weights.
    finite_difference  (grad L(theta + e v) - grad L(theta - e v)) / 2e: two more gradients, no graph of a gradient.
    first_order        H v = 0, as in released code (MAML's first-order form).

All operations go through `Weights`, so the same code runs in one process and under ZeRO. Under ZeRO, H v is a central
difference, which needs only first-order gradients. Weights are written in place and restored bit for bit.

Sources: Finn et al. 2017 (MAML) for the look-ahead; Pearlmutter 1994 for H v; IMMA and MIMA for its use here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from harness.training.weights import Loss, Vector, Weights, installed

Mode = Literal["exact", "finite_difference", "first_order"]


def hessian_vector(
    weights: Weights, loss: Loss, names: Sequence[str], vector: Mapping[str, Tensor], mode: Mode
) -> Vector:
    """Return H v over `names`, where H is the Hessian of `loss` at the installed weights.

    `vector` covers a subset of `names` (S_l); the product covers all of them, so that S_l and S_u may differ.
    """
    if mode == "exact":
        return weights.curvature(loss, names, vector)
    return _central_difference(weights, loss, names, vector)


def _central_difference(weights: Weights, loss: Loss, names: Sequence[str], vector: Mapping[str, Tensor]) -> Vector:
    start: Vector = {}
    for name in vector:  # one at a time, where vectors wait in main memory
        start |= weights.aside(weights.read([name]))
    length = weights.norm(vector)
    step = weights.relative_step * weights.norm(start) / length  # a number on the device, which the host does not read
    step = torch.where(length == 0, 1.0, step)  # the product with zeros is zero, whatever the step
    sides = []
    for sign in (1.0, -1.0):
        weights.shift(vector, sign * step)
        try:
            sides.append(weights.gradient(loss, names))
        finally:
            weights.write(start)
    ahead, behind = sides
    return {name: ahead[name].sub_(behind[name]).div_((2 * step).to(ahead[name].device)) for name in names}


Starts = tuple[Vector, ...]
"""S_l at the start of each step of a look-ahead; the first entry is empty, since these weights are installed."""


@dataclass(frozen=True)
class Adapted:
    """The result of a look-ahead, and what its backward pass needs."""

    end: Vector  # theta_K on S_l; its memory may be reused
    starts: Starts


@dataclass(frozen=True)
class LookAhead:
    """K virtual SGD steps of a lower level from the installed weights, and the backward pass through them."""

    weights: Weights
    names: Sequence[str]  # S_l and S_u together: the weights that get gradients
    lower: Sequence[str]  # S_l
    losses: Sequence[Loss]  # L_0 .. L_{K-1}, one per step
    learning_rate: float  # alpha

    def adapted(self) -> Adapted:
        """Take the steps, then restore the model; return the result."""
        starts: list[Vector] = []
        current: Vector = {}
        for step, loss in enumerate(self.losses):
            starts.append(current)
            with installed(self.weights, current):
                slope = self.weights.gradient(loss, self.lower)
            # one weight at a time and in place: a vector over all weights is as large as the model
            for name, value in slope.items():
                start = current[name].to(value.device) if current else self.weights.read([name])[name]
                value.mul_(-self.learning_rate).add_(start)
            current = self.weights.aside(slope) if step + 1 < len(self.losses) else slope
        return Adapted(current, tuple(starts))

    def pull_back(
        self, starts: Starts, cotangent: Mapping[str, Tensor], mode: Mode, wanted: Sequence[str] | None = None
    ) -> Vector:
        """Return v_0 on `wanted` (default: all of `names`) from v_K = `cotangent`; `starts` are those of `adapted`.

        `cotangent` covers S_l; weights that it does not name count as zero.
        """
        wanted = self.names if wanted is None else wanted
        current = dict(cotangent)
        if mode != "first_order":
            for step in reversed(range(len(self.losses))):
                inside = {name: current[name] for name in self.lower}
                # step 0 needs only the wanted names; the other steps also need S_l, for the next H v
                reached = wanted if step == 0 else list(dict.fromkeys([*self.lower, *wanted]))
                with installed(self.weights, starts[step]):
                    curved = hessian_vector(self.weights, self.losses[step], reached, inside, mode)
                for name, value in curved.items():
                    change = value.mul_(-self.learning_rate)
                    current[name] = change.add_(current[name].to(change.device)) if name in current else change
        zeros = self.weights.read([name for name in wanted if name not in current])
        return {name: current[name] if name in current else zeros[name].zero_() for name in wanted}


def hypergradient(
    look_ahead: LookAhead, adapted: Adapted, upper: Loss, mode: Mode, wanted: Sequence[str] | None = None
) -> Vector:
    """Return d/dtheta U(theta_K(theta)) over `wanted` (default: all names of `look_ahead`).

    `adapted` is the result of `look_ahead` from the installed weights. The model is unchanged afterwards.
    """
    weights = look_ahead.weights
    with installed(weights, weights.aside(adapted.end)):
        names = wanted if mode == "first_order" and wanted is not None else look_ahead.names
        cotangent = weights.gradient(upper, names)
    return look_ahead.pull_back(adapted.starts, cotangent, mode, wanted)


class Merging(Protocol):
    """A merge of N adapted weights into one: linear in them and in the start, so it is summed branch by branch."""

    def from_start(self, start: Vector) -> Vector:
        """Return the contribution of the start to the merged weights; the memory of `start` may be reused."""

    def add_adapted(self, total: Vector, index: int, adapted: Vector) -> None:
        """Add to `total` the contribution of one branch's adapted weights; the memory of `adapted` may be reused."""

    def to_start(self, cotangent: Mapping[str, Tensor]) -> Vector:
        """Return the gradient with respect to the start; `cotangent` is the one with respect to the merged weights."""

    def to_adapted(self, cotangent: Vector) -> Iterator[Vector]:
        """Yield the gradient with respect to the adapted weights of each branch; `cotangent` is emptied.

        Branches may get the same tensors, so none is to be changed.
        """


@dataclass(frozen=True)
class Merged:
    """The merged result of several branches' look-aheads, and what the backward pass through each needs."""

    weights: Vector  # Merge({theta'_n}) on S_l
    starts: tuple[Starts, ...]  # one per branch


def merged(branches: Sequence[LookAhead], merging: Merging) -> Merged:
    """Return Merge({theta'_n}), with one branch's end in memory at a time. The model is unchanged afterwards."""
    weights = branches[0].weights
    result = weights.aside(merging.from_start(weights.read(branches[0].lower)))
    starts = []
    for index, branch in enumerate(branches):
        adapted = branch.adapted()
        merging.add_adapted(result, index, adapted.end)
        starts.append(adapted.starts)
        del adapted  # free it before the next branch allocates its own
    return Merged(result, tuple(starts))


def merged_hypergradient(
    branches: Sequence[LookAhead], merging: Merging, upper: Loss, mode: Mode, wanted: Sequence[str] | None = None
) -> Vector:
    """Return d/dtheta U(Merge({theta'_n(theta)})): N look-aheads from one start, merged (MIMA, Algorithm 1).

    All branches have the same names and the same S_l. The merged model keeps the start's weights outside S_l. `wanted`
    names the weights whose gradient is returned (S_u; default: all); with one lower step, the backward pass computes
    only these. The model is unchanged afterwards.
    """
    weights, names, lower = branches[0].weights, branches[0].names, set(branches[0].lower)
    wanted = names if wanted is None else wanted
    together = merged(branches, merging)
    with installed(weights, together.weights):
        # all maps from here act on each name separately, except H v, which needs all of S_l
        cotangent = weights.gradient(upper, wanted if mode == "first_order" else names)
    starts = together.starts
    del together  # free the merged weights: they are as large as S_l
    inside = {name: cotangent.pop(name) for name in list(cotangent) if name in lower}
    result = cotangent | merging.to_start({name: inside[name] for name in wanted if name in inside})
    result = {name: result[name] for name in wanted}
    del cotangent
    for branch, own, from_adapted in zip(branches, starts, merging.to_adapted(inside), strict=True):
        # one expression: a variable would keep one branch's vectors alive while the next allocates its own
        for name, value in branch.pull_back(own, from_adapted, mode, wanted).items():
            result[name] += value
    return result
