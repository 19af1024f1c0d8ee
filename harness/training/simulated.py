"""An adaptation that a defense simulates: a few optimizer steps from the installed weights, which stay as they are.

`harness.training.bilevel.LookAhead` takes plain SGD steps and can be differentiated. This one also takes the steps of
the attacks' own optimizers (AdamW, clipping); its result is a constant for the upper level (first order).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from harness.training.weights import Loss, Vector, Weights, installed

Optimizer = Literal["sgd", "adamw"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def simulated(
    weights: Weights,
    names: Sequence[str],
    losses: Sequence[Loss],
    *,
    learning_rate: float,
    optimizer: Optimizer = "adamw",
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Vector:
    """Return `names` after one step on each of `losses`; the installed weights are unchanged.

    adamw: moments start at zero at each call, as in a new training. `clip_norm` limits the norm of each step's gradient
    over all names. Everything is elementwise but that norm, so it runs on partitioned weights too.
    """
    current: Vector = {}
    means: Vector = {}
    squares: Vector = {}
    for count, loss in enumerate(losses, 1):
        with installed(weights, current):
            slope = weights.gradient(loss, names)
        scale = None
        if clip_norm is not None:
            scale = (clip_norm / (weights.norm(slope) + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        current = current or weights.read(names)
        for name in names:
            value = slope.pop(name).to(current[name])
            if scale is not None:
                value.mul_(scale.to(value))
            current[name].mul_(1 - learning_rate * weight_decay)
            if optimizer == "sgd":
                current[name].sub_(value, alpha=learning_rate)
                continue
            if count == 1:
                means[name], squares[name] = torch.zeros_like(value), torch.zeros_like(value)
            means[name].lerp_(value, 1 - _BETAS[0])
            squares[name].mul_(_BETAS[1]).addcmul_(value, value, value=1 - _BETAS[1])
            root = (squares[name].sqrt() / (1 - _BETAS[1] ** count) ** 0.5).add_(_EPSILON)
            current[name].addcdiv_(means[name], root, value=-learning_rate / (1 - _BETAS[0] ** count))
    return current
