"""Examples dropped from training when the model's prediction depends on their text too much (Wen et al., ICLR 2024).

At each step the UNet predicts once more for the empty text, without gradient, at the same noisy latents and timesteps.
An example is kept when

    |eps(x_t, t, caption) - eps(x_t, t, "")| < threshold

strictly, the L2 norm over its elements in fp32. The loss is the mean over those that are kept; a step that keeps none
is skipped. The released README has a threshold of 2 on latents of 16,384 values, the same at all timesteps.

Facts: memorization.md 5, memorization_checked.md. Differences from the released code: with several processes the mean
is over the kept examples of all of them, and a step is skipped only if all keep none (there each process decides alone,
which can stop a run for good); where no step was ever taken nothing fails. Cost: one forward pass for each example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from defenses.mitigation.by_hooks import TrainingMitigation
from harness.contracts.hooks import AdaptationHook
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters:
    """Default: the command of the released README."""

    threshold: Annotated[float, Field(gt=0, le=1e6)] = 2.0


@register("adaptation_hook")
class DropLargeNorms(AdaptationHook):
    """Weighs examples by 1 or 0."""

    name = "noise_norm_filter"
    version = 1
    renormalizes = True
    Parameters = Parameters

    def weigh(self, model, batch):
        """Return 1 for examples below the threshold, 0 for the others."""
        import torch

        nothing = model.encode_text([""]).expand(len(batch.losses), -1, -1)
        with torch.no_grad(), batch.run.autocast():
            unconditional = model.denoise(batch.noisy_latents, batch.timesteps, nothing)
        batch.run.ledger.forward_passes += len(batch.losses)
        norms = (batch.prediction.detach().float() - unconditional.float()).flatten(1).norm(dim=1)
        return (norms < self.parameters.threshold).to(batch.losses.dtype)


@register("defense")
class NoiseNormFilter(TrainingMitigation):
    """Have trainers drop examples whose prediction depends on their text too much."""

    name = "noise_norm_filter"
    version = 1
    hook = "noise_norm_filter"
    Parameters = Parameters
