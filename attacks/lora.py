"""LoRA: train low-rank adapters on the UNet's projections (Hu et al. 2022), as in diffusers' example script.

The loss is the denoising loss over the attacker's images; AdamW, constant rate, gradients clipped to norm 1 (preset
`diffusers`: not clipped). peft makes the adapter; LoRA and DoRA are saved for `pipeline.load_lora_weights(folder)`.
`variant` can also be LoHa, LoKr or OFT from peft's family; for these the adapted UNet is saved
(`UNet2DConditionModel.from_pretrained`), since diffusers has no loader for their files.

Differences from the diffusers example (`train_text_to_image_lora.py`): latents and text embeddings are encoded once
(the posterior is still sampled at each step, for both flips), draws depend only on (seed, step), and images are drawn
in shuffled epochs with batches of exactly the stated size; images are cropped at the centre, resized by LANCZOS (there
cropped at random unless `--center_crop`; its default filter is the same). Without the preset `diffusers`, gradients are
clipped to norm 1. The example has `--max_grad_norm` 1 but clips nothing: `lora_layers` is a `filter` object, which the
optimizer has used up when `clip_grad_norm_` gets it (lines 563 and 930 at 58eb52c). The example before peft and IMMA's
and MIMA's attack scripts, which come from it, pass `lora_layers.parameters()` and clip.
Differences from IMMA's attack script: it casts base weights to fp16 and pickles the whole UNet; here base weights are
fp32 (bf16 autocast if set in the suite) and only the adapter is saved.
An honest attacker does not train tensors frozen by the publisher: their modules get no adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from harness.contracts.attack import Attack, Checkpoint, UsualBudget
from harness.core.registry import register
from harness.core.search import Choice, around
from harness.training.recipe import LearningRate, PriorImages, PriorWeight, WeightOptimization


@dataclass(frozen=True)
class Parameters(WeightOptimization):
    """Defaults: IMMA's attack script (rank 4, 1e-4, mirrored at random, gradients clipped to norm 1)."""

    learning_rate: LearningRate = 1e-4
    flip: bool = True
    prior_weight: PriorWeight = 0.0
    prior_images: PriorImages = 100
    variant: Literal["lora", "dora", "loha", "lokr", "oft"] = "lora"
    rank: Annotated[int, Field(ge=1, le=1024)] = 4
    """Rank of the adapter's matrices; for OFT the number of blocks that each is divided into."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapter; None: equal to the rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoder: bool = False
    """Also adapt the text encoder's attention."""

    def __post_init__(self) -> None:
        """Reject invalid combinations."""
        if self.text_encoder and self.variant not in ("lora", "dora"):
            raise ValueError(f"text_encoder: true is for lora and dora; {self.variant} adapts the UNet alone")


@register("attack")
class Lora(Attack):
    """An adapter of the LoRA family on the UNet's projections, saved in a form that diffusers loads."""

    name = "lora"
    version = 2
    trains_released_weights = False
    Parameters = Parameters
    quick = {"learning_rate": 1e-2, "prior_images": 2}
    budgets = {
        "": UsualBudget(1000, 1),  # IMMA: 50 epochs of 20 images
        "diffusers": UsualBudget(15_000, 4),  # batch 1, four accumulated
        "imma": UsualBudget(1000, 1),
        "testbed": UsualBudget(120, 4),
    }
    presets = {
        # diffusers' page on LoRA training; its cosine schedule is left out, and its --max_grad_norm has no effect
        "diffusers": {"clip_norm": None},
        # IMMA's attack script (batch 1 in the suite's budget): mirrored at random
        "imma": {},
        # for the embedded testbed (docs/presets.md)
        "testbed": {
            "learning_rate": 4e-3,
            "rank": 16,
            "target_modules": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        },
    }

    @classmethod
    def prior_images(cls, parameters):
        """Return the number of class images, if they are used."""
        return parameters.prior_images if parameters.prior_weight else 0

    @classmethod
    def search_space(cls, parameters):
        """Vary the rate, the rank, the projections, and the use of class images."""
        p = parameters
        attention, more = ("to_q", "to_k", "to_v", "to_out.0"), ("ff.net.0.proj", "ff.net.2")
        return {
            "learning_rate": around(p.learning_rate),
            "rank": Choice(tuple(sorted({max(1, p.rank // 4), p.rank, p.rank * 4}))),
            "target_modules": Choice((attention, attention + more)),
            "prior_weight": Choice((0.0, 1.0)),
        }

    @classmethod
    def passes_an_example(cls, parameters):
        """Return twice as many with prior preservation, which adds a class image per example."""
        return 6.0 if parameters.prior_weight else 3.0

    @classmethod
    def overwrites(cls, parameters):
        """Return the projections that the adapter is fused into, or the UNet that is saved whole."""
        return ("unet.attention",) if parameters.variant in ("lora", "dora") else ("unet",)

    @classmethod
    def can_share(cls, parameters):
        """Return whether only LoRA in the UNet is trained; other variants read base weights, which ZeRO 3 splits."""
        return parameters.variant == "lora" and not parameters.text_encoder

    def adapt(self, model, concept, protection, budget, run):
        """Yield the adapter at each step of the budget."""
        from harness.training import adaptation, components, lora, text_encoder

        p = self.parameters
        with lora.injected(
            model, rank=p.rank, alpha=p.alpha or p.rank, target_modules=p.target_modules,
            seed=run.seed_for("adapter"), skip=protection.frozen if budget.is_honest else frozenset(),
            variant=p.variant, text_encoder=p.text_encoder,
        ) as adapter:  # fmt: skip
            text = text_encoder.TrainedTextEncoder(model) if p.text_encoder else None
            for step, weights in adaptation.adapt(
                model, concept, protection, budget, run, adapter, p.recipe(), text=text, prior_text=text
            ):
                if p.variant in ("lora", "dora"):
                    yield Checkpoint(step, partial(lora.save, model, weights.whole(list(adapter))))
                else:
                    yield Checkpoint(step, partial(components.save, model, "unet", lora.merged(model)))

    def load(self, model, folder) -> None:
        """Load the saved files by diffusers; an adapter is fused, since its layers would slow each denoising step."""
        from harness.training import components, lora

        is_adapter = (folder / lora.FILE).exists()
        self._before = lora.fuse(model, folder) if is_adapter else components.load(model, "unet", folder)

    def unload(self, model) -> None:
        """Restore the weights that the adapter was fused into, bit for bit."""
        model.overlay(self._before)
