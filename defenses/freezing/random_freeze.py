"""Random freezing: the publisher's API refuses a random share of the UNet's tensors. FreezeAsGuard's baseline.

Huang and Gao, arXiv 2405.17472 v1, "Random-rho". Its generator is not in the released code; ours shuffles the tensors
by the seed and takes the first of them, so that with one seed a smaller share is part of a larger one.

The paper's ratio counts tensors, in which a bias weighs as much as a kernel. `of: parameters` counts elements: in the
shuffled order, every tensor is frozen that the share still has room for.
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
    """What is frozen."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """The share; the paper's best for FreezeAsGuard on SD v1.5."""
    of: Literal["tensors", "parameters"] = "tensors"
    """What the share counts. tensors: the paper's."""


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
