"""Full fine-tuning: all UNet weights on the attacker's images under their own captions (FreezeAsGuard's user).

AdamW at 1e-5, batch 4, 2000 steps, VAE and text encoder frozen (Huang et al., papers' facts: freezeasguard.md). This is
the strongest attack if memory suffices, and the setting in which FreezeAsGuard freezes tensors; an honest attacker does
not train those.

Differences from the diffusers example (`train_text_to_image.py`): those of `dreambooth`, but for
the filter, which is the same; no EMA, no SNR weights.
Differences from FreezeAsGuard's code (`target_trainer.py`, `innocent_trainer.py` with their scripts): its optimizer
step accumulates four batches of one image; here a step is one global batch of four. Its images are resized bilinearly;
it crops at the centre, as here. Both scripts mirror images at random, which the paper does not mention; so do the
defaults here. Gradients are clipped to norm 1 in both.
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
    """Defaults: those of FreezeAsGuard's scripts (`--learning_rate=1e-05 --max_grad_norm=1 --random_flip`)."""

    learning_rate: LearningRate = 1e-5
    flip: bool = True
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
