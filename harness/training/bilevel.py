"""Hypergradients: the gradient of an upper loss that is evaluated after lower steps, with respect to where they began.

    theta_0 = theta,   theta_{k+1} = theta_k - alpha * grad L_k(theta_k)  on S_l,   k = 0 .. K-1
    wanted: d/dtheta U(theta_K)

With v_K = grad U(theta_K), the chain rule backwards through the steps is

    v_k = v_{k+1} - alpha * H_k v_{k+1}|S_l,     H_k = Hessian of L_k at theta_k

and v_0 is the hypergradient. Modes say how H v is had:

    exact              reverse over reverse, at the cost of a double backward. Needs attention with second derivatives
                       (`second_order`). Forward AD is not used: on a UNet it failed or was off by 1 % without an error.
    finite_difference  (grad L(theta + e v) - grad L(theta - e v)) / 2e: two more gradients, no graph of a gradient.
    first_order        H v = 0, as released code does (MAML's first-order form).

Losses are callables of no arguments that read the weights installed in the model at the time, and give the same loss
when called again (same batch, same noise). Weights are written in place and put back bit for bit, so that a forward
under gradient checkpointing recomputes with the weights that it was run with.

Sources: Finn et al. 2017 (MAML) for the look-ahead; Pearlmutter 1994 for H v; IMMA and MIMA for what it serves here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Mode = Literal["exact", "finite_difference", "first_order"]
Vector = dict[str, Tensor]
"""A value for some of the parameters, by name."""
Loss = Callable[[], Tensor]

RELATIVE_STEP = 1e-5
"""Length of the perturbation of a central difference over the norm of what it perturbs, in fp32: the best of six from
1e-3 to 1e-6 in one direction on a small UNet (relative error 9e-5). fp64 rounds less and takes a shorter one."""
RELATIVE_STEP_FP64 = 1e-6


@contextlib.contextmanager
def second_order() -> Iterator[None]:
    """Attention whose backward can be differentiated: fused kernels have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def gradient(loss: Loss, parameters: Mapping[str, nn.Parameter]) -> Vector:
    """Return the gradient of the loss with respect to `parameters`; zero where it does not depend on one."""
    with _requiring_grad(parameters):
        found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.detach()
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


@contextlib.contextmanager
def _requiring_grad(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let exactly these parameters take part, whatever was set on them before."""
    before = {name: p.requires_grad for name, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])


@contextlib.contextmanager
def installed(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Write `values` into the parameters that they name; put the old ones back, bit for bit, on leaving."""
    before = {name: parameters[name].detach().clone() for name in values}
    _write(parameters, values)
    try:
        yield
    finally:
        _write(parameters, before)


@torch.no_grad()
def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def hessian_vector(
    loss: Loss, parameters: Mapping[str, nn.Parameter], vector: Mapping[str, Tensor], mode: Mode
) -> Vector:
    """Return H v over `parameters`, H the Hessian of `loss` at the installed weights.

    `vector` names a subset of `parameters` (S_l); the product has all of them, so that S_l and S_u may differ.
    """
    if mode == "exact":
        return _reverse_over_reverse(loss, parameters, vector)
    if mode == "finite_difference":
        return _central_difference(loss, parameters, vector)
    return {name: torch.zeros_like(p) for name, p in parameters.items()}


def _reverse_over_reverse(loss: Loss, parameters: Mapping[str, nn.Parameter], vector: Mapping[str, Tensor]) -> Vector:
    with _requiring_grad(parameters), second_order():
        lower = [parameters[name] for name in vector]
        slopes = torch.autograd.grad(loss(), lower, create_graph=True, allow_unused=True)
        pairs = [(g, v) for g, v in zip(slopes, vector.values(), strict=True) if g is not None and g.requires_grad]
        if not pairs:  # the loss is linear in S_l
            return {name: torch.zeros_like(p) for name, p in parameters.items()}
        product = sum((g * v).sum() for g, v in pairs)
        found = torch.autograd.grad(product, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if h is None else h.detach()
        for (name, p), h in zip(parameters.items(), found, strict=True)
    }


def _central_difference(loss: Loss, parameters: Mapping[str, nn.Parameter], vector: Mapping[str, Tensor]) -> Vector:
    length = _norm(vector.values())
    if length == 0:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    is_double = all(p.dtype == torch.float64 for p in parameters.values())
    relative = RELATIVE_STEP_FP64 if is_double else RELATIVE_STEP
    step = relative * _norm(parameters[name].detach() for name in vector) / length
    start = {name: parameters[name].detach().clone() for name in vector}
    sides = []
    for sign in (1.0, -1.0):
        with installed(parameters, {name: start[name] + sign * step * v for name, v in vector.items()}):
            sides.append(gradient(loss, parameters))
    return {name: (sides[0][name] - sides[1][name]) / (2 * step) for name in parameters}


def _norm(tensors) -> float:
    return float(torch.sqrt(sum(t.detach().double().square().sum() for t in tensors)))


@dataclass
class LookAhead:
    """K virtual SGD steps of a lower level, from the installed weights, and the way back through them."""

    parameters: Mapping[str, nn.Parameter]  # S_l and S_u together
    lower: Sequence[str]  # S_l
    losses: Sequence[Loss]  # L_0 .. L_{K-1}, one a step
    learning_rate: float  # alpha

    def __post_init__(self) -> None:
        self._before: list[Vector] = []  # S_l at the start of each step; nothing for the first: it is installed

    def adapted(self) -> Vector:
        """Return theta_K on S_l. The model is left as it was."""
        self._before = []
        current: Vector = {}
        for loss in self.losses:
            self._before.append(current)
            with installed(self.parameters, current):
                slope = gradient(loss, {name: self.parameters[name] for name in self.lower})
            start = current or {name: self.parameters[name].detach() for name in self.lower}
            current = {name: start[name] - self.learning_rate * slope[name] for name in self.lower}
        return current

    def pull_back(self, cotangent: Mapping[str, Tensor], mode: Mode) -> Vector:
        """Return v_0 from v_K = `cotangent` (over all of `parameters`), after `adapted`."""
        current = dict(cotangent)
        if mode == "first_order":
            return current
        for loss, before in zip(reversed(self.losses), reversed(self._before), strict=True):
            with installed(self.parameters, before):
                curved = hessian_vector(loss, self.parameters, {name: current[name] for name in self.lower}, mode)
            current = {name: value - self.learning_rate * curved[name] for name, value in current.items()}
        return current


def hypergradient(look_ahead: LookAhead, upper: Loss, mode: Mode) -> Vector:
    """Return d/dtheta U(theta_K(theta)) over the parameters of `look_ahead`; the model is left as it was."""
    with installed(look_ahead.parameters, look_ahead.adapted()):
        cotangent = gradient(upper, look_ahead.parameters)
    return look_ahead.pull_back(cotangent, mode)


class Merging(Protocol):
    """How N adapted weights become one: a linear map of the start and of them, so that it is summed up one by one."""

    def from_start(self, start: Mapping[str, Tensor]) -> Vector:
        """Return the part of the merged weights that the start contributes."""

    def from_adapted(self, index: int, adapted: Mapping[str, Tensor]) -> Vector:
        """Return the part that the adapted weights of one branch contribute."""

    def to_start(self, cotangent: Mapping[str, Tensor]) -> Vector:
        """Return the gradient with respect to the start, given that with respect to the merged weights."""

    def to_adapted(self, index: int, cotangent: Mapping[str, Tensor]) -> Vector:
        """Return the gradient with respect to the adapted weights of one branch."""


def merged_hypergradient(branches: Sequence[LookAhead], merging: Merging, upper: Loss, mode: Mode) -> Vector:
    """Return d/dtheta U(Merge({theta'_n(theta)})): N look-aheads from one start, merged (MIMA, Algorithm 1).

    All branches have the same parameters and the same S_l. One branch's weights are held at a time. Parameters outside
    S_l are in the merged model as they are in the start. The model is left as it was.
    """
    parameters, lower = branches[0].parameters, branches[0].lower
    merged = merging.from_start({name: parameters[name].detach() for name in lower})
    for index, branch in enumerate(branches):
        _add(merged, merging.from_adapted(index, branch.adapted()))
    with installed(parameters, merged):
        cotangent = gradient(upper, parameters)
    inside = {name: cotangent[name] for name in lower}
    result = {name: value for name, value in cotangent.items() if name not in inside}
    result |= merging.to_start(inside)
    for index, branch in enumerate(branches):
        own = {name: torch.zeros_like(p) for name, p in parameters.items()} | merging.to_adapted(index, inside)
        _add(result, branch.pull_back(own, mode))
    return {name: result[name] for name in parameters}


def _add(total: Vector, part: Mapping[str, Tensor]) -> None:
    for name, value in part.items():
        total[name] = total[name] + value
