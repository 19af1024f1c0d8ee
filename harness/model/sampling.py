"""Draw images from a model: the same settings, seeds and starting noise for every trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.core.sampling import Sampling
from harness.core.seeds import mix
from harness.model.drawing import Drawing, Watcher, draw, starting_latents
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
    hooks: Sequence[Watcher] = (),
    first_prompt: int = 0,
) -> Iterator[tuple[int, int, Image]]:
    """Yield (prompt index, image index, image) for every image, batched over prompts.

    `settings`: the suite's `sampling`. The starting noise of an image depends only on (seed, prompt index, image
    index), not on the batch, the defense, or the step of the attack. `hooks` run on each batch, in their order.
    `first_prompt`: index of the first prompt, for its noise, where others are drawn apart. Raises ValueError for a
    model that takes the guidance as an input.
    """
    if model.unet.config.time_cond_proj_dim is not None:
        raise ValueError("models that take the guidance as an input (time_cond_proj_dim) are not supported")
    pipeline = model.pipeline
    original = pipeline.scheduler
    pipeline.scheduler = scheduler_for(model, settings.scheduler)
    todo = [(p, i) for p in range(len(prompts)) for i in range(images_per_prompt)]
    size = settings.batch_size
    try:
        embeddings = model.encode_text(prompts)
        nothing = model.encode_text([""])
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            # those of a rehearsal need values: some schedulers search in them
            place = "cpu" if model.device.type == "meta" else model.device
            pipeline.scheduler.set_timesteps(settings.steps, device=place)
            seeds = tuple(mix(seed, first_prompt + p, i) for p, i in part)
            latents, generators = starting_latents(model, seeds, embeddings)
            drawing = Drawing(
                model=model,
                run=run,
                prompts=tuple(prompts[p] for p, _ in part),
                seeds=seeds,
                timesteps=tuple(pipeline.scheduler.timesteps.tolist()),
                latents=latents,
                embeddings=embeddings[[p for p, _ in part]],
                negative_embeddings=nothing.repeat(len(part), 1, 1),
                guidance=settings.guidance if settings.guidance > 1 else None,
                indices=tuple(i for _, i in part),
            )
            for (prompt, index), image in zip(part, draw(drawing, generators, hooks), strict=True):
                yield prompt, index, image
    finally:
        pipeline.scheduler = original
