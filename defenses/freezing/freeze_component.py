"""Freezing one component of the UNet: what FreezeAsGuard's authors tried first (arXiv 2405.17472 v1, table 1).

Which tensors count to a component is not stated there. Here: attention, the query, key, value and output projections
of self- and cross-attention; convolutions, every convolution but those that lead into and out of attention blocks
(`proj_in`, `proj_out`, convolutions in SD 1.x and linear in SD 2.1); time_embeddings, the time embedding and its
projections in the residual blocks. Weights and biases alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters:
    """What is frozen."""

    component: Literal["attention", "convolutions", "time_embeddings"] = "attention"


@register("defense")
class FreezeComponent(Defense):
    """Freeze the attention projections, the convolutions or the time embeddings; no weight is changed."""

    name = "freeze_component"
    version = 1
    threat_model = ThreatModel(must_honour=("frozen",))
    uses = frozenset()
    Parameters = Parameters

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the frozen tensors."""
        from harness.training.selection import select

        return Protection(frozen=frozenset(select(model.parameters(), self.parameters.component)))
