"""Weights partly frozen by a mask: theta_i = m_i theta_pre,i + (1 - m_i) theta_ft,i for every tensor i (FreezeAsGuard).

Two copies of the weights are enough (Huang and Gao 2024, facts: freezeasguard.md, section 2): theta, installed in the
network, and Delta = theta_pre - theta_ft. theta_pre = theta + (1 - m) Delta is constant and never stored. One gradient
g with respect to theta serves both levels:

    equation 11  dL/dm_i        = <g_i, Delta_i>
    equation 12  dL/dtheta_ft,i = (1 - m_i) g_i

    mask step    x_i <- x_i - (eta_m a_i + c 2 (mean(m) - rho) / N) m_i (1 - m_i) / T             (equation 8)
                 theta_i <- theta_i + Delta_i (m_i' - m_i)
    user step    theta_i <- theta_i - eta (1 - m_i)^2 g_i,  Delta_i <- Delta_i + eta (1 - m_i) g_i  (9 and 10)

with a_i = <Delta_i, g_i> and m = sigmoid(x / T). The few logits are on the CPU; a step reads from the device once, all
a_i together. Vectors are whole tensors or, under ZeRO 3, the pieces of this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.model.saved_state import require
from harness.training.weights import STEP, Vector, Weights


@dataclass(frozen=True)
class MaskRule:
    """The update rule of the mask."""

    ratio: float  # rho: the wanted share of frozen tensors
    temperature: float  # T
    learning_rate: float  # eta_m
    sparsity: float  # c; not multiplied by the learning rate
    normalise: str = "none"  # none | rms | adam; see `Signal`

    def mask(self, logits: Tensor) -> Tensor:
        """Return m [tensors] in (0, 1)."""
        return torch.sigmoid(logits.float() / self.temperature)

    def pulls(self, logits: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Return (by signal a, by sparsity): what one step subtracts from the logits (equation 8), each [tensors]."""
        mask = self.mask(logits)
        bend = mask * (1 - mask) / self.temperature
        held_back = 2 * (mask.mean() - self.ratio) / len(mask) * bend
        return self.learning_rate * signal * bend, self.sparsity * held_back

    def moved(self, logits: Tensor, pulls: tuple[Tensor, Tensor]) -> Tensor:
        """Return the logits after subtracting these pulls, in the logits' precision."""
        by_signal, by_sparsity = pulls
        return (logits.float() - by_signal - by_sparsity).to(logits.dtype)


class Signal:
    """The normalised value that replaces a in equation 8.

    none: a itself. rms: a divided by its root mean square over the tensors; if the a differ by orders of magnitude,
    only the largest have an effect. adam: each tensor's running mean divided by the root of its running mean square
    (Kingma and Ba 2015; betas 0.9 and 0.999, bias corrected): of similar size for all tensors, and noise averages out.
    """

    BETAS, SMALL = (0.9, 0.999), 1e-30

    def __init__(self, normalise: str, tensors: int):
        if normalise not in ("none", "rms", "adam"):
            raise ValueError(f"unknown normalisation {normalise!r}")
        self.normalise = normalise
        self.running = torch.zeros(2, tensors, dtype=torch.float64)  # means of a and of its square
        self.count = 0

    def normalised(self, signal: Tensor) -> Tensor:
        """Return the normalised signal, [tensors]."""
        if self.normalise == "none":
            return signal
        if self.normalise == "rms":
            return signal / signal.square().mean().sqrt().clamp_min(self.SMALL)
        self.count += 1
        betas = torch.tensor(self.BETAS, dtype=torch.float64)[:, None]
        self.running = betas * self.running + (1 - betas) * torch.stack([signal, signal.square()]).double()
        mean, square = self.running / (1 - betas**self.count)
        return (mean / square.sqrt().clamp_min(self.SMALL)).float()


@dataclass(frozen=True)
class MaskStep:
    """The inputs and effects of one mask step, each [tensors]."""

    signal: Tensor  # a
    by_signal: Tensor  # subtracted from the logits by the signal
    by_sparsity: Tensor  # subtracted by the sparsity term


class MaskedWeights:
    """theta and Delta under a mask; see the module docstring. `weights` hold theta."""

    def __init__(
        self,
        weights: Weights,
        finetuned: Mapping[str, Tensor],
        logits: Tensor,
        rule: MaskRule,
        *,
        user_learning_rate: float,
        user_optimizer: str = "sgd",
        delta_dtype: torch.dtype = torch.float32,
    ):
        """Change `weights` from theta_pre to theta(m); `finetuned` are the whole tensors of theta_ft, by name.

        `logits` [tensors] are in the order of the names of `finetuned`. `user_optimizer` "adamw": betas 0.9 and 0.999,
        eps 1e-8, without weight decay, on theta_ft.
        """
        self.weights, self.rule = weights, rule
        self.names = list(finetuned)
        self.logits = logits
        self.signal = Signal(rule.normalise, len(logits))
        self._rate = user_learning_rate
        self.delta = weights.read(self.names)
        torch._foreach_sub_(list(self.delta.values()), list(weights.pieces(finetuned).values()))
        self.delta = {name: value.to(delta_dtype) for name, value in self.delta.items()}
        self._optimizer = None
        if user_optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(
                list(self.delta.values()), lr=user_learning_rate, weight_decay=0.0, foreach=True
            )
        self._towards_finetuned(self.mask, -1.0)

    @property
    def mask(self) -> Tensor:
        """The mask m [tensors]."""
        return self.rule.mask(self.logits)

    def _towards_finetuned(self, mask: Tensor, sign: float) -> None:
        """Add sign * (1 - m) Delta to theta: -1 goes from theta_pre to theta, 1 goes back."""
        self._shift(sign * (1 - mask))

    def _shift(self, scales: Tensor) -> None:
        self.weights.shift(self.delta, dict(zip(self.names, scales.tolist(), strict=True)))

    def mask_step(self, slope: Vector) -> MaskStep:
        """Update the mask with the gradient g of the upper loss with respect to theta."""
        signal = self.weights.inner(self.delta, slope)
        before = self.mask
        pulls = self.rule.pulls(self.logits, self.signal.normalised(signal))
        self.logits = self.rule.moved(self.logits, pulls)
        self._shift(self.mask - before)
        return MaskStep(signal, *pulls)

    @torch.no_grad()
    def user_step(self, slope: Vector) -> None:
        """Update theta_ft with the gradient g of the lower loss with respect to theta; `slope` is overwritten."""
        free = (1 - self.mask).tolist()
        slopes, deltas = [slope[name] for name in self.names], list(self.delta.values())
        if self._optimizer is None:
            # one operation on theta, as in torch's SGD: bit-identical to it if nothing is frozen
            self.weights.shift(slope, {n: -self._rate * f * f for n, f in zip(self.names, free, strict=True)})
            torch._foreach_mul_(slopes, [self._rate * f for f in free])
            torch._foreach_add_(deltas, slopes)
            return
        torch._foreach_mul_(slopes, free)
        self._towards_finetuned(self.mask, 1.0)
        for delta, value in zip(deltas, slopes, strict=True):
            delta.grad = value.neg_().to(delta.dtype)  # Delta decreases as theta_ft increases
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._towards_finetuned(self.mask, -1.0)

    # -- state: the interface of `harness.training.loop` ------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to resume, as whole tensors of each weight."""
        flat = self._collected("theta", self.weights.read(self.names)) | self._collected("delta", self.delta)
        slots = {name: self._optimizer.state[value] for name, value in self.delta.items()} if self._optimizer else {}
        for slot in dict.fromkeys(slot for values in slots.values() for slot in values):
            kept = {name: values[slot] for name, values in slots.items()}
            if slot == STEP:
                flat |= {f"user/{slot}/{name}": value for name, value in kept.items()}
            else:
                flat |= self._collected(f"user/{slot}", kept)
        return flat | self._small()

    def _small(self) -> dict[str, Tensor]:
        signal = self.signal
        return {"logits": self.logits, "signal": signal.running, "signal_count": torch.tensor(signal.count)}

    def _collected(self, role: str, values: Vector) -> dict[str, Tensor]:
        return {f"{role}/{name}": whole for name, whole in self.weights.collected(values).items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        require(state, {path: tensor.shape for path, tensor in self._small().items()})
        shapes = self.weights.shapes(self.names)
        require(state, {f"{role}/{name}": shapes[name] for role in ("theta", "delta") for name in self.names})
        user = [path.split("/", 2) for path in state if path.startswith("user/")] if self._optimizer else []
        require(state, {f"user/{slot}/{name}": () if slot == STEP else shapes.get(name) for _, slot, name in user})
        for name, value in self.delta.items():
            self.weights.settle(self.weights.pieces({name: state[f"theta/{name}"]}))
            value.copy_(self.weights.pieces({name: state[f"delta/{name}"]})[name])
        self.logits = state["logits"]
        self.signal.running, self.signal.count = state["signal"], int(state["signal_count"])
        for _, slot, name in user:
            kept, value = state[f"user/{slot}/{name}"], self.delta[name]
            if slot != STEP:  # the counter stays on the CPU, where AdamW keeps it
                kept = self.weights.pieces({name: kept})[name].to(value)
            self._optimizer.state[value][slot] = kept
