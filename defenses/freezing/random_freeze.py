"""Random freezing: the publisher's API does not train a random share of the UNet's tensors. FreezeAsGuard's baseline.

Huang and Gao, arXiv 2405.17472 v1, "Random-rho". Its generator is not in the released code; this one shuffles the
tensors by the seed and freezes the first ones, so that with one seed a smaller share is part of a larger one.

The paper's ratio counts tensors, so a bias counts as much as a kernel. `of: parameters` counts elements: in shuffled
order, each tensor that still fits into the share is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from defenses.freezing.base import Freezing
from harness.contracts.protection import Protection
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters:
    """The share to freeze, and its unit."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """The share to freeze; 0.3 is the paper's best for FreezeAsGuard on SD v1.5."""
    of: Literal["tensors", "parameters"] = "tensors"
    """The unit of the share; tensors in the paper."""


@register("defense")
class RandomFreeze(Freezing):
    """Freeze a random share of the UNet's tensors; no weight is changed."""

    name = "random_freeze"
    version = 1
    uses = frozenset({"seed"})
    Parameters = Parameters

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the frozen tensors."""
        import torch

        from harness.training.selection import select

        p = self.parameters
        known = model.parameters()
        names = select(known, "unet")
        source = torch.Generator().manual_seed(run.seed_for("frozen"))
        shuffled = [names[i] for i in torch.randperm(len(names), generator=source).tolist()]
        if p.of == "tensors":
            return Protection(frozen=frozenset(shuffled[: round(p.ratio * len(names))]))
        room = p.ratio * sum(known[name].numel() for name in names)
        frozen = []
        for name in shuffled:
            if known[name].numel() <= room:
                room -= known[name].numel()
                frozen.append(name)
        return Protection(frozen=frozenset(frozen))
