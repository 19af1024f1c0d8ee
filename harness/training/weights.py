"""The trained weights of a stage, in one process or several, and the optimizer that updates them.

Immunization needs gradients at many points: at the released weights, after a lower step, and at small perturbations of
both. Its code uses only this interface, so it runs unchanged in one process (`LocalWeights`) and on weights that
DeepSpeed partitions over several processes (`harness.training.sharding`).

A *vector* holds a value for each of some weights, by name. Its tensors have the form in which this process holds a
weight: the whole tensor, or under ZeRO 3 the flat piece of this rank. Sums and multiples of vectors are elementwise and
do not depend on this form; norms and matrix products do, so they are methods here.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.core.precision import kind_of
from harness.core.regions import GRADIENT, OPTIMIZER, WAITING, region
from harness.model.run import Run
from harness.model.saved_state import UnfitState, require

Vector = dict[str, Tensor]
"""A value for each of some weights, by name."""
Loss = Sequence[Callable[[], Tensor]]
"""A loss as the sum of its parts (micro-batches, concepts or terms). Calling a part evaluates it at the installed
weights, always with the same batch and noise. Only one part's graph is in memory at a time."""


RELATIVE_STEPS = {"fp64": 1e-6, "fp32": 3e-5, "bf16": 1e-3, "fp16": 1e-3}
"""By precision: length of a central difference's perturbation, divided by the norm of the perturbed weights. The best
of nine values from 1e-2 to 1e-6 for MIMA on the testbed's UNet and on a tiny random one
(`tests/benchmarks/hypergradient_error.py`). On these two, the error against the exact hypergradient in fp64 is 8e-6 and
1e-5 in fp32, 2e-2 and 3e-2 in bf16 (no less in exact mode), 1e-2 and 5e-3 in fp16 (exact: 6e-3 and 4e-3). Without the
second order it is 8e-2 and 9e-2."""


def relative_step(parameters: Mapping[str, nn.Parameter], run: Run | None) -> float:
    """Return the relative step for the precision of weights and computation."""
    if parameters and all(p.dtype == torch.float64 for p in parameters.values()):
        return RELATIVE_STEPS["fp64"]
    return RELATIVE_STEPS[kind_of(run.precision) if run else "fp32"]


@dataclass(frozen=True)
class Level:
    """One level of the bilevel program: which weights it trains, and how."""

    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float | None = None  # limit of the gradient norm over all its weights; None: no clipping
    momentum: float | None = None  # of SGD, used instead of AdamW; 0.0: plain SGD; None: AdamW


class Weights(Protocol):
    """Weights by name; see the module docstring."""

    levels: Mapping[str, Level]
    relative_step: float
    """Length of a central difference's perturbation, divided by the norm of the perturbed weights."""

    def read(self, names: Sequence[str]) -> Vector:
        """Return copies of the installed weights."""

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Install values temporarily: a look-ahead, a perturbation, or weights that were read before."""

    def shift(self, vector: Mapping[str, Tensor], scale: float | Tensor | Mapping[str, float]) -> None:
        """Add scale * vector to the installed weights, like `write`; `scale` is one number or one per name."""

    def exchange(self, values: Vector) -> None:
        """Swap `values` with the installed weights, like `write`, without keeping extra copies."""

    def settle(self, values: Mapping[str, Tensor]) -> None:
        """Install values permanently: optimizer steps continue from them."""

    def gradient(self, loss: Loss, names: Sequence[str]) -> Vector:
        """Return the gradient of the loss, averaged over all processes; zero for weights it does not depend on.

        In fp16 it may evaluate the loss again at a smaller scale, and raises `harness.model.loss_scale.Overflow` if no
        scale serves: the training loop then skips the step.
        """

    def evaluate(self, loss: Loss) -> None:
        """Evaluate every part without a gradient, for the values that parts keep; a collective call."""

    def curvature(self, loss: Loss, names: Sequence[str], vector: Mapping[str, Tensor]) -> Vector:
        """Return H v over `names` by differentiating twice; H is the Hessian of `loss` over `names` and v's names.

        Raises NotImplementedError for partitioned weights.
        """

    def aside(self, values: Vector) -> Vector:
        """Let a vector wait until it is used: as it is, or moved to main memory (`Sharding.vectors`); return it.

        `write`, `shift`, `exchange` and `norm` take such vectors, with the same results.
        """

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the Euclidean norm of a vector, over all processes: one number in fp64, on the device."""

    def dot(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Return the inner product of two vectors over the same weights, over all processes: as `norm` does."""

    def inner(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Return the inner product of each weight's values, [weights] in the order of `first`, fp32 on the CPU."""

    def pieces(self, whole: Mapping[str, Tensor]) -> Vector:
        """Return whole tensors in the form in which this process holds weights; the inverse of gathering."""

    def multiply(self, values: Mapping[str, Tensor], matrix: Tensor) -> Vector:
        """Return the product of each weight-shaped value [out, in] and a matrix [in, in]; `values` may be empty."""

    def step(self, level: str, gradient: Mapping[str, Tensor], rate: float = 1.0) -> None:
        """Clip the gradient by the level's `clip_norm` and step its optimizer; only this level's weights change.

        `rate`: factor of the level's learning rate in this step, for a schedule.
        """

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to resume; every process calls it, and the first one's result counts.

        Weights are "weight/<name>" and optimizer slots "slot/<level>/<name>/<slot>". All are whole tensors of each
        weight, so they do not depend on how the weights are spread.
        """

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned in the first process, whatever the weights were spread over then.

        Each process takes its share. Raises UnfitState, before anything is changed, if weights or slots do not fit.
        """

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of whole weights."""

    def collected(self, values: Mapping[str, Tensor]) -> Vector:
        """Return a vector's whole tensors in the first process, and nothing in the others, which take part.

        Tensors may be the given ones, or copies on the CPU.
        """

    def whole(self, names: Sequence[str]) -> Vector:
        """Return the weights as whole tensors, gathered if they are partitioned."""

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes of trained "weights" and of "optimizer" states in this process."""


@contextlib.contextmanager
def installed(weights: Weights, values: Vector) -> Iterator[None]:
    """Install `values`; on exit restore the old weights, bit for bit. Meanwhile `values` hold the old weights.

    Weights are changed in place, not by a functional call, so that gradient checkpointing recomputes the forward pass
    with the same weights.
    """
    weights.exchange(values)
    try:
        yield
    finally:
        weights.exchange(values)


@contextlib.contextmanager
def second_order() -> Iterator[None]:
    """Use attention with a differentiable backward pass, since fused kernels have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


STEP = "step"
"""AdamW's slot that is a counter, the same for all weights of a level; every other slot is shaped like its weight."""


class LevelAdamW(torch.optim.AdamW):
    """AdamW over parameter groups shared by several levels; each level has its own rates and moments.

    Each group has `levels`, the names of the levels that train it. `step` updates only the groups of the current
    `level`, so two levels may train the same weight, and DeepSpeed, which supports one optimizer, can own all groups.
    `rate` is the factor of the level's learning rate in this step. On GPUs all of a step is one kernel (torch's fused
    AdamW), and its counter is there too.
    """

    def __init__(self, groups: Sequence[Mapping], levels: Mapping[str, Level], *, fused: bool | None = None):
        """`fused`: None: if all weights are on GPUs; a CPU has such a kernel too, which rounds otherwise."""
        if fused is None:
            fused = all(weight.is_cuda for group in groups for weight in group["params"])
        super().__init__([dict(g) for g in groups], betas=(0.9, 0.999), eps=1e-8, fused=fused or None)
        self.fused = fused
        self.level: str | None = None
        self.rate = 1.0
        self._levels = dict(levels)
        self.slots: dict[str, defaultdict] = {name: defaultdict(dict) for name in levels}

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step of the current `level`."""
        groups, state = self.param_groups, self.state
        level = self._levels[self.level]
        if level.momentum is not None:
            self._descend(level)
            return
        rates = {"lr": self.rate * level.learning_rate, "weight_decay": level.weight_decay}
        try:
            self.param_groups = [{**g, **rates} for g in groups if self.level in g["levels"]]
            self.state = self.slots[self.level]
            super().step(closure)
        finally:
            self.param_groups, self.state = groups, state

    def _descend(self, level: Level) -> None:
        """Take a step of SGD as torch does, but with AdamW's weight decay; without momentum it keeps no state."""
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
                weight.mul_(1 - self.rate * level.learning_rate * level.weight_decay)
                weight.add_(along, alpha=-self.rate * level.learning_rate)


def warmed(step: int, warmup_steps: int) -> float:
    """Return the factor of a constant rate at a level's own step, counted from 0: linear over the warm-up, then 1.

    The first step has rate 0, as with diffusers' `constant_with_warmup`: it fills the moments only.
    """
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def grouped(levels: Mapping[str, Level]) -> list[tuple[frozenset[str], list[str]]]:
    """Return (levels, names) for each group of weights trained by the same levels; each weight once, in given order."""
    users: dict[str, set[str]] = {}
    for name, level in levels.items():
        for weight in level.names:
            users.setdefault(weight, set()).add(name)
    groups: dict[frozenset[str], list[str]] = {}
    for weight, names in users.items():
        groups.setdefault(frozenset(names), []).append(weight)
    return list(groups.items())


def finite_gradient(run: Run | None, loss: Loss, compute: Callable[[Loss], Vector]) -> Vector:
    """Return `compute(loss)`, which is linear in the loss; in fp16 from a scaled loss, and with finite values.

    Raises `harness.model.loss_scale.Overflow`, in every process, if it is not finite in fp16.
    """
    if run is None or not run.scales_loss:
        return compute(loss)

    def scaled(factor: float) -> tuple[Vector, list[Tensor]]:
        values = []

        def times(part: Callable[[], Tensor]) -> Tensor:
            value = part()
            values.append(value.detach())
            return value * factor

        return compute([partial(times, part) for part in loss]), values

    return run.loss_scale.gradient(scaled, run.world.all)


def finite_curvature(
    run: Run | None, loss: Loss, vector: Mapping[str, Tensor], compute: Callable[[Loss, Mapping[str, Tensor]], Vector]
) -> Vector:
    """Return `compute(loss, vector)`, which is linear in both, as `finite_gradient` does.

    The vector passes through fp16 too. Its largest value is brought to about 1 by a power of two: the gradients that it
    holds may be smaller than fp16's numbers.
    """
    if run is None or not run.scales_loss:
        return compute(loss, vector)
    largest = float(torch.stack([value.abs().max() for value in vector.values()]).max())
    if not 0 < largest < math.inf:
        return finite_gradient(run, loss, lambda parts: compute(parts, vector))
    factor = 2.0 ** min(-math.frexp(largest)[1], 120)  # itself a number of fp32
    near_one = {name: value * factor for name, value in vector.items()}
    found = finite_gradient(run, loss, lambda parts: compute(parts, near_one))
    for value in found.values():
        value.div_(factor)
    return found


def differentiate(loss: Loss, parameters: Mapping[str, nn.Parameter]) -> Vector:
    """Return the gradient of the loss by autograd, part by part; zero for parameters it does not depend on.

    Each slope is added as soon as it is known, so there is never a second gradient of all parameters.
    """
    chosen = list(parameters.values())
    before = [p.grad for p in chosen]
    with _requiring_grad(parameters):
        try:
            for p in chosen:
                p.grad = None
            for part in loss:
                torch.autograd.backward(part(), inputs=chosen)
            return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        finally:
            for p, grad in zip(chosen, before, strict=True):
                p.grad = grad


def differentiate_twice(
    loss: Loss, parameters: Mapping[str, nn.Parameter], names: Sequence[str], vector: Mapping[str, Tensor]
) -> Vector:
    """Return H v over `names` by reverse over reverse, part by part.

    Forward over reverse is not used: on a UNet it failed, or was wrong by 1 % without an error.
    """
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    lower, wanted = ([parameters[name] for name in chosen] for chosen in (vector, names))
    with _requiring_grad({n: parameters[n] for n in (*vector, *names)}), second_order():
        for part in loss:
            slopes = torch.autograd.grad(part(), lower, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(slopes, vector.values(), strict=True) if g is not None and g.requires_grad]
            if not pairs:  # this part is linear in the parameters
                continue
            product = sum((g * v).sum() for g, v in pairs)
            found = torch.autograd.grad(product, wanted, allow_unused=True)
            for name, curved in zip(names, found, strict=True):
                if curved is not None:
                    total[name] += curved.detach()
    return total


@contextlib.contextmanager
def _requiring_grad(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Set `requires_grad` of these parameters; restore it on exit."""
    before = {name: p.requires_grad for name, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])


def inner_products(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product of each tensor of `first` with that of the same name in `second`, [tensors]."""
    return torch.stack([torch.dot(value.flatten().float(), second[n].flatten().float()) for n, value in first.items()])


def fitting_slots(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], levels: Mapping[str, Level]
) -> dict[tuple[str, str], set[str]]:
    """Return the names of weights by (level, slot) in a state of weights with these shapes.

    Raises UnfitState if a weight is missing, or if the slots are not those of the levels.
    """
    require(state, {f"weight/{name}": shape for name, shape in shapes.items()})
    found: dict[tuple[str, str], set[str]] = {}
    for path in state:
        if path.startswith("weight/") and path.removeprefix("weight/") not in shapes:
            raise UnfitState(f"it has '{path}', which is not trained")
        if not path.startswith("slot/"):
            continue
        level, name, slot = path.split("/")[1:]
        if level not in levels or name not in levels[level].names:
            raise UnfitState(f"it has '{path}', which no optimizer has")
        require(state, {path: () if slot == STEP else shapes[name]})
        found.setdefault((level, slot), set()).add(name)
    for (level, slot), names in found.items():
        if names != set(levels[level].names):
            raise UnfitState(f"its '{slot}' of '{level}' is incomplete")
    return found


def add_scaled(held: Tensor, value: Tensor, scale: float | Tensor) -> None:
    """Add scale * value to a tensor in place, where it is; the host does not wait for a scale on the device."""
    value = value.to(held.device)
    if isinstance(scale, Tensor) and held.device.type != "cpu":
        held.addcmul_(value, scale.to(value))
    else:  # on a CPU nobody waits, and both operations need not round alike
        held.add_(value, alpha=float(scale))


def bytes_of(values: Iterable[object]) -> int:
    """Return the bytes of the tensors among values."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def squared_norm(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> Tensor:
    """Return the sum of squares of the tensors of a vector, fp64, computed on a device; None: where they are."""
    return sum(t.detach().to(device).double().square().sum() for t in tensors.values())


def dot_product(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], device: torch.device | None = None
) -> Tensor:
    """Return the inner product of two vectors, fp64, computed on a device; None: where they are."""
    return sum((t.to(device).double() * second[name].to(device).double()).sum() for name, t in first.items())


def put_aside(values: Vector, run: Run | None) -> Vector:
    """Move a vector to main memory, one tensor at a time, if the run's resources say so; return it."""
    if run is not None and run.sharding.vectors == "cpu":
        with region(WAITING):
            for name in values:
                values[name] = values[name].to("cpu")
    return values


class LocalWeights:
    """Whole weights in this process."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], levels: Mapping[str, Level], run: Run | None = None):
        """`parameters` contains at least the levels' names; `run`, if given, counts the backward passes."""
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
        """Install values."""
        for name, value in values.items():
            self.parameters[name].copy_(value)

    settle = write

    @torch.no_grad()
    def shift(self, vector: Mapping[str, Tensor], scale: float | Tensor | Mapping[str, float]) -> None:
        """Add scale * vector to the installed weights."""
        for name, value in vector.items():
            add_scaled(self.parameters[name], value, scale[name] if isinstance(scale, Mapping) else scale)

    @torch.no_grad()
    def exchange(self, values: Vector) -> None:
        """Swap values with the installed weights, one weight at a time."""
        for name, value in values.items():
            before = self.parameters[name].detach().clone()
            self.parameters[name].copy_(value)
            value.copy_(before)

    def gradient(self, loss: Loss, names: Sequence[str]) -> Vector:
        """Return the gradient of the loss."""
        chosen = {n: self.parameters[n] for n in names}
        with self._counted(1), region(GRADIENT):
            return finite_gradient(self._run, loss, lambda parts: differentiate(parts, chosen))

    @torch.no_grad()
    def evaluate(self, loss: Loss) -> None:
        """Evaluate every part."""
        for part in loss:
            part()

    def curvature(self, loss: Loss, names: Sequence[str], vector: Mapping[str, Tensor]) -> Vector:
        """Return H v over `names` by differentiating twice."""
        with self._counted(3), region(GRADIENT):  # a gradient, and a backward through it that costs twice as much
            return finite_curvature(
                self._run, loss, vector, lambda parts, along: differentiate_twice(parts, self.parameters, names, along)
            )

    @contextlib.contextmanager
    def _counted(self, backwards: int) -> Iterator[None]:
        """Count `backwards` backward passes for each forward pass in the block."""
        before = self._run.ledger.forward_passes if self._run else 0.0
        try:
            yield
        finally:
            if self._run:
                self._run.ledger.backward_passes += backwards * (self._run.ledger.forward_passes - before)

    def aside(self, values: Vector) -> Vector:
        """Let a vector wait; return it."""
        return put_aside(values, self._run)

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the Euclidean norm of a vector."""
        return squared_norm(tensors, self._device()).sqrt()

    def _device(self) -> torch.device | None:
        return next((p.device for p in self.parameters.values()), None)

    def dot(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Return the inner product of two vectors."""
        return dot_product(first, second, self._device())

    def inner(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Return the inner product of each weight's values."""
        return inner_products(first, second).cpu()

    def pieces(self, whole: Mapping[str, Tensor]) -> Vector:
        """Return copies: weights are whole here."""
        return {name: value.to(self.parameters[name], copy=True) for name, value in whole.items()}

    def multiply(self, values: Mapping[str, Tensor], matrix: Tensor) -> Vector:
        """Return value @ matrix for each value."""
        return {name: value @ matrix.to(value) for name, value in values.items()}

    def step(self, level: str, gradient: Mapping[str, Tensor], rate: float = 1.0) -> None:
        """Take one step of a level."""
        chosen = self.levels[level]
        for name in chosen.names:
            self.parameters[name].grad = gradient[name].to(self.parameters[name])
        if chosen.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.parameters[n] for n in chosen.names], chosen.clip_norm)
        self._optimizer.level, self._optimizer.rate = level, rate
        with region(OPTIMIZER):
            self._optimizer.step()
        for name in chosen.names:
            self.parameters[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer slots, not copied."""
        flat = {f"weight/{name}": self.parameters[name].detach() for name in self._trained()}
        for level, slots in self._slots():
            for name, values in slots.items():
                flat |= {f"slot/{level}/{name}/{slot}": torch.as_tensor(value) for slot, value in values.items()}
        return flat

    def _trained(self) -> list[str]:
        return list(dict.fromkeys(name for level in self.levels.values() for name in level.names))

    def _slots(self) -> Iterator[tuple[str, dict[str, dict]]]:
        names = {p: n for n, p in self.parameters.items()}
        for level, state in self._optimizer.slots.items() if self._optimizer else ():
            yield level, {names[p]: values for p, values in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        slots = fitting_slots(state, self.shapes(self._trained()), self.levels)
        for name in self._trained():
            self.write({name: state[f"weight/{name}"]})
        for (level, slot), names in slots.items():
            for name in names:
                weight = self.parameters[name]
                value = state[f"slot/{level}/{name}/{slot}"]
                if slot == STEP:  # AdamW keeps the counter on the CPU, but the fused one
                    value = value.to(weight.device) if self._optimizer.fused else value
                else:
                    value = value.to(weight)
                self._optimizer.slots[level][weight][slot] = value

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of weights."""
        return {name: tuple(self.parameters[name].shape) for name in names}

    def collected(self, values: Mapping[str, Tensor]) -> Vector:
        """Return the values: they are whole here."""
        return dict(values)

    def whole(self, names: Sequence[str]) -> Vector:
        """Return the weights."""
        return self.read(names)

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes of trained weights and of optimizer states."""
        trained = {name: self.parameters[name] for name in self._trained()}
        slots = [value for _, state in self._slots() for values in state.values() for value in values.values()]
        return {"weights": bytes_of(trained.values()), "optimizer": bytes_of(slots)}
