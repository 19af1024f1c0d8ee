"""Loss scaling for fp16, where values below 6e-8 are zero and those above 65504 infinite: the loss is multiplied.

The rule is that of torch.amp.GradScaler with its defaults: begin at 65536, halve where a gradient overflows, double
after 2000 gradients in a row that did not. GradScaler itself does not serve: it unscales `.grad` of an optimizer's
parameters, while a method here takes several gradients a step, as vectors, before it steps or instead of stepping.

It differs in one thing. GradScaler skips the step whose gradient overflowed; a short training would lose a good part of
its steps to the search for a scale, and no longer be the one that its budget names. A loss here can be evaluated again
(`harness.training.weights.Loss`), so its gradient is computed again at half the scale. A step is skipped only if its
gradient is not finite at any scale, or if the loss itself is not: the forward pass overflows.

A power of two as a factor changes no digit of a gradient that neither overflows nor gets lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

START, BACKOFF, GROWTH, INTERVAL = 65536.0, 0.5, 2.0, 2000
"""GradScaler's defaults."""
SMALLEST, LARGEST = 2.0**-8, 2.0**24
"""A scale stays between these: further ones help no gradient that fp16 can hold, and the loss itself is in fp32."""
OF_INPUTS = 1024.0
"""The first scale of a gradient with respect to inputs; see `slope`."""
MOST_SKIPPED = 0.05
"""A training that skips a larger share of its steps fails: it is not the one that its budget names."""


class Overflow(FloatingPointError):
    """A gradient that is not finite at any scale. The training loop skips the step; elsewhere the stage fails."""


@dataclass
class LossScale:
    """The scale of one training, and what it cost. Equal in all processes that share a stage; saved with its state."""

    scale: float = START
    clean: int = 0  # gradients in a row that did not overflow
    repeated: int = 0  # gradients that were computed again at a smaller scale
    skipped: int = 0  # steps

    def gradient(
        self, compute: Callable[[float], tuple[dict[str, Tensor], Iterable[Tensor]]], agree: Callable[[bool], bool]
    ) -> dict[str, Tensor]:
        """Return a gradient, unscaled, whose values are all finite.

        `compute` gets a scale and returns (gradient of the scaled loss, the losses before scaling). `agree` says
        whether a flag is true in every process. Raises Overflow, in every process.
        """
        before = self.scale
        while True:
            found, losses = compute(self.scale)
            if agree(all_finite(found.values())):
                for value in found.values():
                    value.mul_(1 / self.scale)
                self._count_clean()
                return found
            self.clean = 0
            if not agree(all_finite(losses)):
                raise Overflow("the loss is not finite in fp16: the forward pass overflows")
            if self.scale <= SMALLEST:
                self.scale = max(before * BACKOFF, SMALLEST)
                raise Overflow("the gradient is not finite in fp16 at any scale of the loss")
            self.scale *= BACKOFF
            self.repeated += 1

    def _count_clean(self) -> None:
        self.clean += 1
        if self.clean >= INTERVAL:
            self.scale, self.clean = min(self.scale * GROWTH, LARGEST), 0

    def as_json(self) -> dict[str, float]:
        """Return what `restore` needs; powers of two and counts, so JSON has them exactly."""
        return asdict(self)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take what `as_json` returned."""
        for each in fields(self):
            setattr(self, each.name, saved[each.name])


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no value of any tensor is NaN or infinite; one transfer from the device."""
    import torch

    found = [tensor.isfinite().all() for tensor in tensors]
    return bool(torch.stack([each.to(found[0].device) for each in found]).all()) if found else True


def slope(value: Tensor, by: Tensor, is_scaled: bool) -> Tensor:
    """Return the gradient of a number by a tensor; its graph is freed.

    For gradients that no training takes, such as of a norm by an embedding. `is_scaled`: whether the graph computes in
    fp16. Each call begins at the same scale, so that a stage that is continued after a kill gives the same numbers.
    Raises FloatingPointError if it is not finite at any scale.
    """
    import torch

    if not is_scaled:
        return torch.autograd.grad(value, by)[0]
    scale = OF_INPUTS
    while scale >= SMALLEST:
        (found,) = torch.autograd.grad(value * scale, by, retain_graph=True)
        if bool(found.isfinite().all()):
            return found / scale
        scale *= BACKOFF
    raise FloatingPointError("a gradient is not finite in fp16 at any scale; use precision: bf16 or fp32")
