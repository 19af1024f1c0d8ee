"""Implicit hypergradients by a fixed-point iteration, for adaptations too long to be differentiated step by step.

The adapted weights w* are taken for the minimizer of a proximal problem around the released ones, theta:

    w*(theta) = argmin_w  L(w) + 1/2 |w - theta|^2 ,        d w* / d theta = (I + H)^-1 ,   H = Hessian of L at w* .

With g = grad U(w*) and the map  Phi(w, theta) = w - s (grad L(w) + w - theta)  of step size s, the iteration

    v_1 = g ,   v_k+1 = (d Phi / d w)^T v_k + g = (1 - s) v_k - s H v_k + g ,        (d Phi / d theta)^T v = s v

tends to s v = (I + H)^-1 g where it contracts. It is stopped after K iterations. ResAlign's rules for where it does not
contract (2025, as released): the mean over weights of |(d Phi / d w)^T v| / |v| may not exceed 1, and the
norm of the whole gradient is limited; else s is halved, some times, and at last the direct gradient is used alone.

Source of the iteration: Grazzi et al. 2020, "On the Iteration Complexity of Hypergradient Computation".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.training.bilevel import hessian_vector
from harness.training.weights import Loss, Vector, Weights

Mode = Literal["exact", "finite_difference"]


@dataclass(frozen=True)
class Found:
    """A hypergradient, and how it was found."""

    slope: Vector
    halvings: int  # of the step size, before it was accepted
    fell_back: bool  # no step size was accepted: it is the direct gradient


@dataclass(frozen=True)
class FixedPoint:
    """The iteration and its rules."""

    iterations: int  # K; 1: v = g
    mode: Mode  # how H v is computed
    most_norm: float | None = None  # limit of the norm of the whole gradient; None: none
    halvings: int = 5  # most halvings of the step size, which starts at 1

    def gradient(self, weights: Weights, names: Sequence[str], lower: Loss, cotangent: Vector, direct: Vector) -> Found:
        """Return `direct` + (d w* / d theta)^T `cotangent`, where the adapted weights are installed.

        `lower` is L and `cotangent` g, over `names`; `direct` is the gradient of what depends on theta itself. The host
        reads norms before and after each product, and the norm of the gradient, since it decides whether to go on.
        """
        for halvings in range(self.halvings + 1):
            size = 0.5**halvings
            found = self._iterated(weights, names, lower, cotangent, size)
            if found is None:
                continue
            for name, value in found.items():
                value.mul_(size).add_(direct[name].to(value.device))
            # a norm that is not a number is no reason to fall back: the training loop is to see it
            if self.most_norm is None or not float(weights.norm(found)) > self.most_norm:
                return Found(found, halvings, fell_back=False)
        return Found(direct, self.halvings, fell_back=True)

    def _iterated(
        self, weights: Weights, names: Sequence[str], lower: Loss, cotangent: Vector, size: float
    ) -> Vector | None:
        """Return v_K; None where the map stretches v."""
        current = {name: value.clone() for name, value in cotangent.items()}
        for _ in range(self.iterations - 1):
            curved = hessian_vector(weights, lower, names, current, self.mode)
            # one product with the map's Jacobian, in place of H v
            for name, value in curved.items():
                value.mul_(-size).add_(current[name].to(value.device), alpha=1 - size)
            before, after = weights.inner(current, current), weights.inner(curved, curved)
            some = before > 0
            if bool(some.any()) and float((after[some] / before[some]).sqrt().mean()) > 1:
                return None
            for name, value in curved.items():
                value.add_(cotangent[name].to(value.device))
            current = curved
        return current
