"""Freeze one component of the UNet: the first experiment of FreezeAsGuard's authors (arXiv 2405.17472 v1, table 1).

The paper does not state which tensors belong to a component. Here: attention, the query, key, value and output
projections of self- and cross-attention; convolutions, all convolutions except the first and last layer of attention
blocks (`proj_in`, `proj_out`, convolutions in SD 1.x and linear in SD 2.1); time_embeddings, the time embedding and its
projections in the residual blocks. Weights and biases are both included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from defenses.freezing.base import Freezing
from harness.contracts.protection import Protection
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters:
    """The frozen component."""

    component: Literal["attention", "convolutions", "time_embeddings"] = "attention"


@register("defense")
class FreezeComponent(Freezing):
    """Freeze the attention projections, the convolutions or the time embeddings; no weight is changed."""

    name = "freeze_component"
    version = 1
    uses = frozenset()
    Parameters = Parameters

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the frozen tensors."""
        from harness.training.selection import select

        return Protection(frozen=frozenset(select(model.parameters(), self.parameters.component)))
