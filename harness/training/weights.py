"""The trained weights of a stage, wherever they are, and the optimizer that moves them.

Immunization takes gradients at many points: at the released weights, after a lower step, a little to either side. It
uses only this interface, so that the same code runs in one process (`LocalWeights`) and on weights that DeepSpeed
partitions over several (`harness.training.sharding`).

A *vector* is a value for some of the weights by name. Its tensors have the form in which this process holds a weight:
the whole tensor, or under ZeRO 3 the flat piece of this rank. Sums and multiples of vectors are elementwise, so they
work on either form; norms and matrix products do not, and are functions of this interface.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.model.run import Run

Vector = dict[str, Tensor]
"""A value for some of the weights, by name."""
Loss = Sequence[Callable[[], Tensor]]
"""A loss as the sum of its parts, each read off the installed weights, and the same whenever it is called again (same
batch, same noise). One part's graph is alive at a time: parts are micro-batches, concepts, terms."""


RELATIVE_STEPS = {"fp64": 1e-6, "fp32": 3e-5, "bf16": 1e-3}
"""By precision: length of a central difference's perturbation over the norm of what it perturbs. The best of nine from
1e-2 to 1e-6 for MIMA on the testbed's UNet and on a tiny random one (`tests/benchmarks/hypergradient_error.py`): there
the error against the exact hypergradient in fp64 is 8e-6 and 1e-5 in fp32, 2e-2 and 3e-2 in bf16, where the exact mode
has no less. Dropping the second order costs 8e-2 and 9e-2."""


def relative_step(parameters: Mapping[str, nn.Parameter], run: Run | None) -> float:
    """Return the length of the step that suits the precision of weights and computation."""
    if parameters and all(p.dtype == torch.float64 for p in parameters.values()):
        return RELATIVE_STEPS["fp64"]
    return RELATIVE_STEPS[run.precision if run else "fp32"]


@dataclass(frozen=True)
class Level:
    """One level of the bilevel problem: what it trains, and how."""

    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float | None = None  # of the gradient over all its weights; None: not clipped
    momentum: float | None = None  # SGD with so much momentum in AdamW's place, 0.0: plain SGD; None: AdamW


class Weights(Protocol):
    """Weights by name; see the module."""

    levels: Mapping[str, Level]
    relative_step: float
    """Length of a central difference's perturbation over the norm of what it perturbs."""

    def read(self, names: Sequence[str]) -> Vector:
        """Return copies of the installed weights."""

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put values in place, until they are written over: a look-ahead, a perturbation, or what was read before."""

    def shift(self, vector: Mapping[str, Tensor], scale: float | Mapping[str, float]) -> None:
        """Add scale * vector to the installed weights, in place, like `write`; a scale for all, or for each by name."""

    def exchange(self, values: Vector) -> None:
        """Put values in place, like `write`, and what was there into `values`: no copy of either is left."""

    def settle(self, values: Mapping[str, Tensor]) -> None:
        """Put values in place for good: optimizer steps go on from them."""

    def gradient(self, loss: Loss, names: Sequence[str]) -> Vector:
        """Return the gradient of the loss, averaged over all processes; zero where it depends on nothing."""

    def curvature(self, loss: Loss, names: Sequence[str], vector: Mapping[str, Tensor]) -> Vector:
        """Return H v over `names` by differentiating twice, H the Hessian of `loss` over `names` and what v names.

        Raises NotImplementedError where weights are partitioned.
        """

    def norm(self, tensors: Mapping[str, Tensor]) -> float:
        """Return the Euclidean norm of a vector, over all processes."""

    def inner(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Return the inner product of each weight's values, [weights] in the order of `first`, fp32 on the CPU."""

    def pieces(self, whole: Mapping[str, Tensor]) -> Vector:
        """Return whole tensors in the form in which this process holds weights; `whole` is the inverse."""

    def multiply(self, values: Mapping[str, Tensor], matrix: Tensor) -> Vector:
        """Return the product of each weight-shaped value [out, in] and a matrix [in, in]; values may be none."""

    def step(self, level: str, gradient: Mapping[str, Tensor]) -> None:
        """Clip the gradient as the level asks and take one step of its optimizer. Other levels' weights stay."""

    def state(self) -> dict[str, Tensor]:
        """Return all that is needed to go on: weights and optimizer slots, of this process."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, in a process of the same rank and world size."""

    def whole(self, names: Sequence[str]) -> Vector:
        """Return the weights as whole tensors, whatever form they have here."""

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes that this process holds of the trained "weights", and of "optimizer" states."""


@contextlib.contextmanager
def installed(weights: Weights, values: Vector) -> Iterator[None]:
    """Put `values` in place; put the old ones back, bit for bit, on leaving. `values` hold the old ones meanwhile.

    In place, and not by a functional call, so that a forward under gradient checkpointing recomputes with the weights
    that it was run with.
    """
    weights.exchange(values)
    try:
        yield
    finally:
        weights.exchange(values)


@contextlib.contextmanager
def second_order() -> Iterator[None]:
    """Attention whose backward can be differentiated: fused kernels have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


class LevelAdamW(torch.optim.AdamW):
    """AdamW over groups that several levels share; each level has its own rates and its own moments.

    Groups carry `levels`, the names of those that train them. `step` moves the groups of `level` alone: so that two
    levels may train the same weight, and DeepSpeed, which knows one optimizer, can own them all.
    """

    def __init__(self, groups: Sequence[Mapping], levels: Mapping[str, Level]):
        super().__init__([dict(g) for g in groups], betas=(0.9, 0.999), eps=1e-8)
        self.level: str | None = None
        self._levels = dict(levels)
        self.slots: dict[str, defaultdict] = {name: defaultdict(dict) for name in levels}

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step of `level`."""
        groups, state = self.param_groups, self.state
        level = self._levels[self.level]
        if level.momentum is not None:
            self._descend(level)
            return
        rates = {"lr": level.learning_rate, "weight_decay": level.weight_decay}
        try:
            self.param_groups = [{**g, **rates} for g in groups if self.level in g["levels"]]
            self.state = self.slots[self.level]
            super().step(closure)
        finally:
            self.param_groups, self.state = groups, state


    def _descend(self, level: Level) -> None:
        """Take a step of SGD, as torch's, with AdamW's weight decay; without momentum nothing is kept for it."""
        for group in self.param_groups:
            for weight in group["params"] if self.level in group["levels"] else ():
                if weight.grad is None:
                    continue
                along = weight.grad
                if level.momentum:
                    slot = self.slots[self.level][weight]
                    if "momentum" not in slot:
                        slot["momentum"] = torch.zeros_like(weight)
                    along = slot["momentum"].mul_(level.momentum).add_(weight.grad)
                weight.mul_(1 - level.learning_rate * level.weight_decay)
                weight.add_(along, alpha=-level.learning_rate)


def grouped(levels: Mapping[str, Level]) -> list[tuple[frozenset[str], list[str]]]:
    """Return (levels, names) of weights that the same levels train, every weight once, in the order given."""
    users: dict[str, set[str]] = {}
    for name, level in levels.items():
        for weight in level.names:
            users.setdefault(weight, set()).add(name)
    groups: dict[frozenset[str], list[str]] = {}
    for weight, names in users.items():
        groups.setdefault(frozenset(names), []).append(weight)
    return list(groups.items())


def differentiate(loss: Loss, parameters: Mapping[str, nn.Parameter]) -> Vector:
    """Return the gradient of the loss by autograd, part by part; zero where it does not depend on a parameter."""
    total: Vector = {}
    with _requiring_grad(parameters):
        for part in loss:
            found = list(torch.autograd.grad(part(), list(parameters.values()), allow_unused=True))
            taken = set()
            for index, name in enumerate(parameters):
                slope, found[index] = found[index], None
                if slope is None:
                    continue
                if name in total:
                    total[name].add_(slope)
                    continue
                # kept without a copy, unless it shares its memory: autograd may give one tensor for two sums
                is_own = slope.is_contiguous() and slope.data_ptr() not in taken
                taken.add(slope.data_ptr())
                total[name] = slope.detach() if is_own else slope.detach().clone()
    return {n: total[n] if n in total else torch.zeros_like(p) for n, p in parameters.items()}


def differentiate_twice(
    loss: Loss, parameters: Mapping[str, nn.Parameter], names: Sequence[str], vector: Mapping[str, Tensor]
) -> Vector:
    """Return H v over `names` by reverse over reverse, part by part.

    Forward over reverse is not used: on a UNet it failed, or was off by 1 % without an error.
    """
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    lower, wanted = ([parameters[name] for name in chosen] for chosen in (vector, names))
    with _requiring_grad({n: parameters[n] for n in (*vector, *names)}), second_order():
        for part in loss:
            slopes = torch.autograd.grad(part(), lower, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(slopes, vector.values(), strict=True) if g is not None and g.requires_grad]
            if not pairs:  # this part is linear in them
                continue
            product = sum((g * v).sum() for g, v in pairs)
            found = torch.autograd.grad(product, wanted, allow_unused=True)
            for name, curved in zip(names, found, strict=True):
                if curved is not None:
                    total[name] += curved.detach()
    return total


@contextlib.contextmanager
def _requiring_grad(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Set `requires_grad` on these parameters inside the block."""
    before = {name: p.requires_grad for name, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])


def inner_products(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product of each tensor of `first` with its like in `second`: [tensors], on their device."""
    return torch.stack([torch.dot(value.flatten().float(), second[n].flatten().float()) for n, value in first.items()])


def bytes_of(values: Iterable[object]) -> int:
    """Return the bytes of the tensors among values."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def squared_norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of squares of the tensors of a vector, fp64."""
    return sum(t.detach().double().square().sum() for t in tensors.values())


class LocalWeights:
    """Whole weights in this process."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], levels: Mapping[str, Level], run: Run | None = None):
        """`parameters` holds at least what the levels name; `run` counts the backward passes, when given."""
        self.parameters = dict(parameters)
        self.levels = dict(levels)
        self.relative_step = relative_step(self.parameters, run)
        self._run = run
        groups = [{"params": [self.parameters[n] for n in names], "levels": users} for users, names in grouped(levels)]
        self._optimizer = LevelAdamW(groups, levels) if groups else None

    def read(self, names: Sequence[str]) -> Vector:
        """Return copies of the installed weights."""
        return {name: self.parameters[name].detach().clone() for name in names}

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put values in place."""
        for name, value in values.items():
            self.parameters[name].copy_(value)

    settle = write

    @torch.no_grad()
    def shift(self, vector: Mapping[str, Tensor], scale: float | Mapping[str, float]) -> None:
        """Add scale * vector to the installed weights."""
        for name, value in vector.items():
            self.parameters[name].add_(value, alpha=scale[name] if isinstance(scale, Mapping) else scale)

    @torch.no_grad()
    def exchange(self, values: Vector) -> None:
        """Swap values with what is installed, one weight at a time."""
        for name, value in values.items():
            before = self.parameters[name].detach().clone()
            self.parameters[name].copy_(value)
            value.copy_(before)

    def gradient(self, loss: Loss, names: Sequence[str]) -> Vector:
        """Return the gradient of the loss."""
        with self._counted(1):
            return differentiate(loss, {n: self.parameters[n] for n in names})

    def curvature(self, loss: Loss, names: Sequence[str], vector: Mapping[str, Tensor]) -> Vector:
        """Return H v over `names` by differentiating twice."""
        with self._counted(3):  # a gradient, and a backward through it that is twice as long
            return differentiate_twice(loss, self.parameters, names, vector)

    @contextlib.contextmanager
    def _counted(self, backwards: int) -> Iterator[None]:
        """Count so many backward passes for each forward pass of the block."""
        before = self._run.ledger.forward_passes if self._run else 0.0
        yield
        if self._run:
            self._run.ledger.backward_passes += backwards * (self._run.ledger.forward_passes - before)

    def norm(self, tensors: Mapping[str, Tensor]) -> float:
        """Return the Euclidean norm of a vector."""
        return float(squared_norm(tensors).sqrt())

    def inner(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Return the inner product of each weight's values."""
        return inner_products(first, second).cpu()

    def pieces(self, whole: Mapping[str, Tensor]) -> Vector:
        """Return copies: weights are whole here."""
        return {name: value.to(self.parameters[name], copy=True) for name, value in whole.items()}

    def multiply(self, values: Mapping[str, Tensor], matrix: Tensor) -> Vector:
        """Return value @ matrix for each value."""
        return {name: value @ matrix.to(value) for name, value in values.items()}

    def step(self, level: str, gradient: Mapping[str, Tensor]) -> None:
        """Take one step of a level."""
        chosen = self.levels[level]
        for name in chosen.names:
            self.parameters[name].grad = gradient[name].to(self.parameters[name])
        if chosen.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.parameters[n] for n in chosen.names], chosen.clip_norm)
        self._optimizer.level = level
        self._optimizer.step()
        for name in chosen.names:
            self.parameters[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """Return weights as "weight/<name>" and optimizer slots as "slot/<level>/<name>/<slot>"."""
        trained = dict.fromkeys(name for level in self.levels.values() for name in level.names)
        flat = {f"weight/{name}": self.parameters[name].detach() for name in trained}
        for level, slots in self._slots():
            for name, values in slots.items():
                flat |= {f"slot/{level}/{name}/{slot}": torch.as_tensor(value) for slot, value in values.items()}
        return flat

    def _slots(self) -> Iterator[tuple[str, dict[str, dict]]]:
        names = {p: n for n, p in self.parameters.items()}
        for level, state in self._optimizer.slots.items() if self._optimizer else ():
            yield level, {names[p]: values for p, values in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        self.write({n.removeprefix("weight/"): value for n, value in state.items() if n.startswith("weight/")})
        for path, value in state.items():
            if path.startswith("slot/"):
                _, level, name, slot = path.split("/")
                weight = self.parameters[name]
                # a step counter stays on the CPU, where AdamW keeps it
                self._optimizer.slots[level][weight][slot] = value if slot == "step" else value.to(weight.device)

    def whole(self, names: Sequence[str]) -> Vector:
        """Return the weights."""
        return self.read(names)

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes of trained weights, and of optimizer states."""
        trained = {name: self.parameters[name] for level in self.levels.values() for name in level.names}
        slots = [value for _, state in self._slots() for values in state.values() for value in values.values()]
        return {"weights": bytes_of(trained.values()), "optimizer": bytes_of(slots)}
