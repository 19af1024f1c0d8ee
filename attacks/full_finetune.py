"""Full fine-tuning: all UNet weights on the attacker's images under their own captions (FreezeAsGuard's user).

AdamW at 1e-5, batch 4, 2000 steps, VAE and text encoder frozen (Huang et al., papers' facts: freezeasguard.md). This is
the strongest attack if memory suffices, and the setting in which FreezeAsGuard freezes tensors; an honest attacker does
not train those.

Differences from the diffusers example (`train_text_to_image.py`): those of `dreambooth`; no EMA, no SNR weights.
Differences from FreezeAsGuard's code: its optimizer step accumulates four batches of one image; here a step is one
global batch of four.
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks import dreambooth
from attacks.dreambooth import Dreambooth
from harness.contracts.attack import UsualBudget
from harness.core.registry import register
from harness.training.recipe import LearningRate, PriorWeight


@dataclass(frozen=True)
class Parameters(dreambooth.Parameters):
    """Defaults: those of FreezeAsGuard."""

    learning_rate: LearningRate = 1e-5
    prior_weight: PriorWeight = 0.0


@register("attack")
class FullFinetune(Dreambooth):
    """Fine-tuning of all UNet weights, without prior preservation."""

    name = "full_finetune"
    version = 1
    Parameters = Parameters
    budgets = {
        "": UsualBudget(2000, 4),
        "testbed": UsualBudget(120, 4),
    }
    presets = {
        # for the embedded testbed (docs/presets.md)
        "testbed": {"learning_rate": 3e-4, "flip": True},
    }
