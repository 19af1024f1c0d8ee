"""LoRA: train low-rank adapters on the UNet's projections (Hu et al. 2022), as diffusers' example script does.

The denoising loss over the attacker's images; AdamW, constant rate, gradients clipped to norm 1. The adapter is made
by peft and saved as `pipeline.load_lora_weights(folder)` expects it.

Differences from the diffusers example (`train_text_to_image_lora.py`): latents and text embeddings are encoded once
(the posterior is still sampled anew at each step, on either flip), draws depend on (seed, step) alone, and images go
through shuffled epochs over batches of exactly the stated size; images are cropped at the centre, resized by LANCZOS.
Differences from IMMA's attack script: that one casts base weights to fp16 and pickles the whole UNet; here base
weights are fp32 (bf16 autocast when the suite says so) and only the adapter is saved.
An honest attacker leaves tensors alone that the publisher froze: their modules get no adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from attacks.base import Attack, Checkpoint
from harness.registry import register


@dataclass(frozen=True)
class Parameters:
    """Defaults: IMMA's attack script (rank 4, 1e-4, mirrored at random)."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-4
    rank: Annotated[int, Field(ge=1, le=1024)] = 4
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapter; None: equal to the rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    flip: bool = True
    """Mirror half of the images at random."""


@register("attack")
class Lora(Attack):
    """LoRA on the UNet's attention projections, saved as an adapter that diffusers loads."""

    name = "lora"
    version = 2
    Parameters = Parameters
    presets = {
        # examples/text_to_image/train_text_to_image_lora.py: --random_flip is off unless given
        "diffusers": {"flip": False},
        # IMMA's attack script (batch 1 in the suite's budget): mirrored at random
        "imma": {},
        # rates for the embedded testbed (its feasibility run): rank 16 on attention and feed-forward
        "testbed": {
            "learning_rate": 4e-3,
            "rank": 16,
            "target_modules": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        },
    }

    def adapt(self, model, concept, protection, budget, run):
        """Yield the adapter at each step of the budget."""
        import torch

        from harness.protection import Batch, make_hooks
        from harness.training import diffusion, lora
        from harness.training.state import TrainingState, require_finite

        p = self.parameters
        is_honest = budget.attacker == "honest"
        hooks = make_hooks("adaptation_hook", protection.adaptation) if is_honest else []
        scheduler = model.noise_scheduler()
        encoded = diffusion.encode_images(model, run, concept.images, concept.captions, flip=p.flip)
        with lora.injected(
            model, rank=p.rank, alpha=p.alpha or p.rank, target_modules=p.target_modules,
            seed=run.seed_for("adapter"), skip=protection.frozen if is_honest else frozenset(),
        ) as adapter:  # fmt: skip
            trained = list(adapter.values())
            optimizer = torch.optim.AdamW(trained, lr=p.learning_rate, weight_decay=p.weight_decay)
            state = TrainingState(adapter, {"adapter": optimizer})
            start, _ = state.load(run)
            run.ledger.numbers["trainable_parameters"] = sum(t.numel() for t in trained)
            for step in range(start, budget.steps[-1]):
                with run.ledger.phase("train"):
                    batch = diffusion.draw(
                        encoded, budget.batch_size, scheduler.config.num_train_timesteps,
                        seed=run.seed_for("noise"), step=step, device=model.device,
                    )  # fmt: skip
                    losses, noisy, prediction = diffusion.denoising_losses(model, run, scheduler, batch)
                    seen = Batch(step, noisy, batch.timesteps, batch.embeddings, prediction, losses)
                    for hook in hooks:
                        losses = losses * hook.weigh(model, seen)
                    loss = losses.mean()
                    loss.backward()
                    run.ledger.backward_passes += budget.batch_size
                    torch.nn.utils.clip_grad_norm_(trained, p.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                run.track("loss", loss.detach(), step)
                run.report(step + 1, budget.steps[-1])
                if step + 1 in budget.steps:
                    run.ledger.numbers["loss"] = require_finite(loss, f"the attack's loss at step {step + 1}")
                    yield Checkpoint(step + 1, lambda folder: lora.save(model, folder))
                if run.is_checkpoint_due():
                    state.save(run, step + 1)

    def load(self, model, folder) -> None:
        """Load the adapter through diffusers and fuse it: its layers would cost each denoising step anew."""
        from harness.training import lora

        self._before = lora.fuse(model, folder)

    def unload(self, model) -> None:
        """Put back the weights that the adapter was fused into, bit for bit."""
        model.overlay(self._before)
