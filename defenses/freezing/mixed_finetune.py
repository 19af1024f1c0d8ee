"""The start of FreezeAsGuard's mask learning: the model fully fine-tuned on both domains. Not a defense by itself.

Huang and Gao, arXiv 2405.17472 v1 (`mixed_full_trainer.py` of the released code): all UNet tensors are trained on the
publisher's images of the illegal and the innocent domain together; 2000 steps, batch of four, AdamW at 1e-5, constant
rate, gradients clipped to norm 1. It is a separate stage, shared by all masks of the same concepts and seed.

Differences from the released code: fp32 weights; latents and text embeddings are encoded once; a step is one global
batch of four (released: four batches of one); images are resized by LANCZOS (released: bilinear; cropped at the centre
in both).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register
from harness.core.sharding import global_batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of the released script."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-5
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    """Global: over all processes."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    flip: bool = True


@register("preparation")
class MixedFinetune(Defense):
    """Full fine-tuning on the illegal and the innocent domain together."""

    name = "mixed_finetune"
    version = 1
    threat_model = ThreatModel(changes=("unet",))
    can_shard = True
    Parameters = Parameters
    quick = {"steps": 3, "batch_size": 2}

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """A forward and a backward pass per example."""
        return 3.0 * parameters.steps * parameters.batch_size

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Reject a batch that the number of processes does not divide."""
        return list(global_batch(parameters, sharding))

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the fine-tuned UNet."""
        from harness.training import sharding
        from harness.training.diffusion import mean_value
        from harness.training.domains import Domains
        from harness.training.loop import StepOver, train
        from harness.training.selection import select
        from harness.training.weights import Level

        p = self.parameters
        trained = model.change(select(model.parameters(), "unet"))
        domains = Domains(
            model, run, targets, preserved,
            batch_size=p.batch_size, flip=p.flip, seed=run.seed_for("noise"), is_mixed=True,
        )  # fmt: skip
        level = Level(tuple(trained), p.learning_rate, p.weight_decay, p.clip_norm)
        weights = sharding.spread(model, trained, {"fine_tuning": level}, run)

        def step(index: int) -> dict[str, Tensor]:
            parts = domains.mean(index)
            weights.step("fine_tuning", weights.gradient(parts, level.names))
            return {"loss": mean_value(parts)}

        train(run, StepOver(step, weights), p.steps, "the fine-tuning that mask learning starts from")
        return Protection(tensors=weights.whole(list(trained)))
