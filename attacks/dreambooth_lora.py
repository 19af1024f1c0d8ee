"""DreamBooth through LoRA: an adapter trained on the instance prompt, with or without prior preservation.

The attack is `lora` with DreamBooth's settings: captions are the instance prompt, and the loss on class images drawn by
the base model is added (`prior_weight`; Ruiz et al. 2023, Eq. 2).

Differences from the diffusers example (`train_dreambooth_lora.py`): those of `lora` but for clipping, which this
example does (its `params_to_optimize` is a list); its images are cropped at random unless `--center_crop`; `to_add_k`/
`to_add_v`, which SD's UNet does not have, are not listed. Differences from IMMA's script: none in settings (preset
`released`); its rate of 5e-6 is a hundredth of the example's and adapts weakly, so immunity against it means little
(papers' facts: imma.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks import lora
from attacks.lora import Lora
from harness.contracts.attack import UsualBudget
from harness.core.registry import register
from harness.training.recipe import LearningRate, PriorWeight


@dataclass(frozen=True)
class Parameters(lora.Parameters):
    """Defaults: the diffusers example script, with its README's prior preservation for DreamBooth."""

    learning_rate: LearningRate = 5e-4
    prior_weight: PriorWeight = 1.0
    flip: bool = False


@register("attack")
class DreamboothLora(Lora):
    """DreamBooth with the UNet's attention adapted by LoRA."""

    name = "dreambooth_lora"
    version = 1
    Parameters = Parameters
    budgets = {
        "": UsualBudget(500, 1),
        "released": UsualBudget(500, 1),
        "testbed": UsualBudget(120, 4),
    }
    presets = {
        # IMMA's attack script: rate 5e-6, no prior, 500 steps of one image
        "released": {"learning_rate": 5e-6, "prior_weight": 0.0},
        # for the embedded testbed, as for the lora attack (docs/presets.md)
        "testbed": {**Lora.presets["testbed"], "prior_images": 24},
    }
