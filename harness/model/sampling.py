"""Draw images from a model: the same settings, seeds and starting noise for every trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from harness.core.sampling import Sampling
from harness.core.seeds import mix
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run

if TYPE_CHECKING:
    from PIL.Image import Image


def scheduler_for(model: DiffusionModel, name: str):
    """Return the sampling scheduler `name` (ddim, dpmsolver, pndm) with the model's own betas and prediction type."""
    import diffusers

    classes = {
        "ddim": diffusers.DDIMScheduler,
        "dpmsolver": diffusers.DPMSolverMultistepScheduler,
        "pndm": diffusers.PNDMScheduler,
    }
    # a config made for another class lacks clip_sample, whose default would clip latents at 1
    options = {"clip_sample": False} if name == "ddim" else {}
    return classes[name].from_config(model.pipeline.scheduler.config, **options)


def sample(
    model: DiffusionModel,
    run: Run,
    prompts: Sequence[str],
    settings: Sampling,
    *,
    images_per_prompt: int,
    seed: int,
    hooks: Sequence[Any] = (),
) -> Iterator[tuple[int, int, Image]]:
    """Yield (prompt index, image index, image) for every image, batched over prompts.

    `settings` are those of the suite's `sampling`. The starting noise of an image depends on (seed, prompt index,
    image index) alone: not on the batch, the defense, or the step of the attack.
    """
    pipeline = model.pipeline
    original = pipeline.scheduler
    pipeline.scheduler = scheduler_for(model, settings.scheduler)
    todo = [(p, i) for p in range(len(prompts)) for i in range(images_per_prompt)]
    size = settings.batch_size
    try:
        embeddings = model.encode_text(prompts)
        for hook in hooks:
            embeddings = hook.embed(model, prompts, embeddings)
        nothing = model.encode_text([""])
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            chosen = embeddings[[p for p, _ in part]]
            with torch.no_grad(), run.autocast():
                drawn = pipeline(
                    prompt_embeds=chosen,
                    negative_prompt_embeds=nothing.expand(len(part), -1, -1),
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    height=model.image_size,
                    width=model.image_size,
                    generator=[torch.Generator().manual_seed(mix(seed, p, i)) for p, i in part],
                    output_type="pil",
                ).images
            guided = 2 if settings.guidance > 1 else 1
            run.ledger.forward_passes += len(part) * settings.steps * guided
            for (prompt, index), image in zip(part, drawn, strict=True):
                yield prompt, index, image
    finally:
        pipeline.scheduler = original
