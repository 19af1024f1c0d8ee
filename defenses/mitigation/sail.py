"""Starting noise moved to where the conditional density is smooth (SAIL; Jeon et al., ICML 2025).

Before drawing, at the first timestep, for each image by Adam at .05, at most 10 steps:

    minimize over x  J(x) = |delta(x + u)| + alpha |x|
    u = delta(x) / |delta(x)|,   delta(x) = eps(x, prompt) - eps(x, "")

until J <= `threshold`: 8.2 with alpha .05 on SD 1.4, 4 to 6 with alpha .01 on SD 2. |delta(x + u)| stands for a
product with the Jacobian's difference, by a finite difference along u, which is not differentiated. The threshold
depends on the size of x: |x| is about the root of its number of values.

Facts: memorization_checked.md 6b (Dongjae0324 f4ee4b8). Differences from the released code: it draws 8 candidates and
begins again from new noise, with the threshold raised by .1, where one fails; here each image has one try, and what it
reaches is used (`thresholds_missed` counts them). The paper's Algorithm 2 has the square of the finite difference.
Cost for an image: per step 2 passes for the direction, and 2 forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from defenses.mitigation.by_hooks import DrawingMitigation
from harness.contracts.hooks import SamplingHook
from harness.core.registry import register
from harness.model import loss_scale

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.drawing import Drawing


@dataclass(frozen=True)
class Parameters:
    """Defaults: those for SD 1.4."""

    threshold: Annotated[float, Field(gt=0, le=1e6)] = 8.2
    alpha: Annotated[float, Field(ge=0, le=1e3)] = 0.05
    iterations: Annotated[int, Field(ge=1, le=1000)] = 10
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.05


@register("sampling_hook")
class SmoothStart(SamplingHook):
    """Moves the starting noise of each image before the first step."""

    name = "sail"
    version = 1
    needs_gradient = True
    Parameters = Parameters

    def begin(self, drawing: Drawing) -> None:
        """Replace the latents; an image that has reached the threshold stays where it is."""
        import torch

        p = self.parameters
        moved = drawing.latents.detach().float().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([moved], lr=p.learning_rate)
        is_done = torch.zeros(len(moved), dtype=torch.bool, device=moved.device)
        for _ in range(p.iterations):
            with torch.no_grad():
                delta = self._delta(drawing, moved, with_gradient=False)
                direction = delta / delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
            norms = self._delta(drawing, moved + direction, with_gradient=True).flatten(1).norm(dim=1)
            objective = norms + p.alpha * moved.flatten(1).norm(dim=1)
            is_done |= objective.detach() <= p.threshold
            if bool(is_done.all()):
                break
            moved.grad = loss_scale.slope(objective.sum(), moved, drawing.run.scales_loss)
            kept = moved.detach().clone()
            optimizer.step()
            with torch.no_grad():
                moved.copy_(torch.where(is_done.view(-1, 1, 1, 1), kept, moved))
        numbers = drawing.run.ledger.numbers
        numbers["thresholds_missed"] = numbers.get("thresholds_missed", 0) + int((~is_done).sum())
        drawing.latents = moved.detach().to(drawing.latents.dtype)

    def _delta(self, drawing: Drawing, latents: Tensor, *, with_gradient: bool) -> Tensor:
        """Return the prediction for the prompts less that for no text."""
        import torch

        texts = torch.cat([drawing.negative_embeddings, drawing.embeddings])
        both = torch.cat([latents, latents]).to(drawing.latents.dtype)
        said = drawing.predict(both, drawing.timesteps[0], texts, with_gradient=with_gradient).float()
        unconditional, conditional = said.chunk(2)
        return conditional - unconditional


@register("defense")
class Sail(DrawingMitigation):
    """Draw from smoother starting noise."""

    name = "sail"
    version = 1
    Parameters = Parameters
    presets = {
        "sd1": {"threshold": 8.2, "alpha": 0.05},
        "sd2": {"threshold": 5.0, "alpha": 0.01},  # the middle of its sweep on SD 2.0, 4 to 6
    }
