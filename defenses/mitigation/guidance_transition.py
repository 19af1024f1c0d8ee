"""Guidance that begins late, so that drawing leaves the attraction basin of a memorized image (Jain et al., CVPR 2025).

Until a transition the guidance is `before` (0: the prediction for no text alone; negative: away from the prompt), then
it is the suite's.

Profiles, by `transition`
    static   at a stated timestep: 500 with guidance 0 before, or 650 with -2
    dynamic  for each image, at the first local minimum along its steps of |eps(x_t, prompt) - eps(x_t, "")|, with
             guidance 1 before: at the first step whose norm is greater than the one before it

Facts: memorization_checked.md 6b (anubhav1997 44eeb2e). No passes are added: both predictions are made in any case.
Differences from the paper / the released code: not read beyond that sheet; an image without a local minimum keeps
`before` to its end, and is counted (`images_without_transition`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from defenses.mitigation.by_hooks import DrawingMitigation
from harness.contracts.hooks import SamplingHook
from harness.core.registry import register

if TYPE_CHECKING:
    from harness.model.drawing import Drawing


@dataclass(frozen=True)
class Parameters:
    """Defaults: the static transition."""

    transition: Literal["static", "dynamic"] = "static"
    before: Annotated[float, Field(ge=-100, le=100)] = 0.0
    """Guidance before the transition."""
    timestep: Annotated[int, Field(ge=0, le=1000)] = 500
    """The static transition: the first step at or below it has the suite's guidance."""


@register("sampling_hook")
class GuidanceTransition(SamplingHook):
    """Changes the guidance of each image at its transition."""

    name = "guidance_transition"
    version = 1
    Parameters = Parameters

    def begin(self, drawing: Drawing) -> None:
        """Set the guidance before the transition."""
        import torch

        count = len(drawing.prompts)
        self._has_begun = torch.zeros(count, dtype=torch.bool, device=drawing.latents.device)
        if drawing.guidance is None:
            raise ValueError("guidance_transition needs guidance: set sampling.guidance above 1")
        full = drawing.guidance
        self._full = full.clone() if isinstance(full, torch.Tensor) else torch.full((count,), float(full))
        self._full = self._full.to(drawing.latents.device)
        self._last = None
        drawing.guidance = torch.full_like(self._full, self.parameters.before)

    def at_prediction(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Give the suite's guidance to images that have reached their transition."""
        import torch

        if self.parameters.transition == "static":
            self._has_begun |= timestep <= self.parameters.timestep
        else:
            norms = (drawing.conditional - drawing.unconditional).float().flatten(1).norm(dim=1)
            if self._last is not None:
                self._has_begun |= norms > self._last
            self._last = norms
        before = torch.full_like(self._full, self.parameters.before)
        drawing.guidance = torch.where(self._has_begun, self._full, before)

    def end(self, drawing: Drawing) -> None:
        """Count images that never reached their transition."""
        numbers = drawing.run.ledger.numbers
        without = int((~self._has_begun).sum())
        numbers["images_without_transition"] = numbers.get("images_without_transition", 0) + without


@register("defense")
class LateGuidance(DrawingMitigation):
    """Guide only after a transition."""

    name = "guidance_transition"
    version = 1
    Parameters = Parameters
    presets = {
        "static": {"transition": "static", "before": 0.0, "timestep": 500},
        "negative": {"transition": "static", "before": -2.0, "timestep": 650},
        "dynamic": {"transition": "dynamic", "before": 1.0},
    }
