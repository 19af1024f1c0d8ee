"""One batch of images while it is drawn: what a sampling hook may read and change, and the denoising loop.

The loop does what diffusers' `StableDiffusionPipeline` does, with the pipeline's own parts: starting latents,
scheduler, UNet, decoder and image processor. Without hooks its images are the pipeline's, bit for bit. The pipeline's
own callback is not enough: it is called after a step, so that it cannot change the first one; the timesteps are not
known before; guidance is a private attribute; and a change across guidance 1 would need two texts stacked by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from harness.model.pipeline import DiffusionModel
from harness.model.run import Run

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Drawing:
    """A batch of images on their way from noise. Hooks may set the tensors and the guidance, but keep the shapes."""

    model: DiffusionModel
    run: Run
    prompts: tuple[str, ...]  # one an image
    seeds: tuple[int, ...]  # of the starting noise, one an image
    timesteps: tuple[int, ...]  # of all denoising steps, from noise to image
    latents: Tensor  # [images, channels, height, width]
    embeddings: Tensor  # [images, tokens, width], of the prompts
    negative_embeddings: Tensor  # same shape, of the text that guidance leads away from: ""
    guidance: float | Tensor | None
    """w in e("") + w [e(prompt) - e("")], e the UNet's prediction: a number, or one an image, [images]. None: e(prompt)
    alone, in half the passes; the initial value where the suite's guidance is 1 or less, as in diffusers."""

    def predict(
        self, latents: Tensor, timestep: int | Tensor, embeddings: Tensor, *, with_gradient: bool = False
    ) -> Tensor:
        """Return the UNet's prediction [batch, channels, height, width] for latents of any batch.

        `timestep` is one for all, or [batch]. `with_gradient` keeps the graph to latents and embeddings that ask for
        one. Each sample counts as a forward pass in the ledger, and as a backward pass when a gradient goes through.
        """
        scheduler = self.model.pipeline.scheduler
        with torch.set_grad_enabled(with_gradient):
            # the schedulers that `sampling` knows scale nothing, whatever the timestep
            scaled = scheduler.scale_model_input(latents, timestep)
            said = self.model.unet(scaled, timestep, encoder_hidden_states=embeddings, return_dict=False)[0]
        ledger, count = self.run.ledger, latents.shape[0]
        ledger.forward_passes += count

        def count_backward(slope: Tensor) -> None:
            ledger.backward_passes += count

        if said.requires_grad:
            said.register_hook(count_backward)
        return said

    def guided(self, timestep: int | Tensor) -> Tensor:
        """Return what the scheduler steps along: the prediction at the present latents under the present guidance."""
        if self.guidance is None:
            return self.predict(self.latents, timestep, self.embeddings)
        texts = torch.cat([self.negative_embeddings, self.embeddings])
        unconditional, conditional = self.predict(torch.cat([self.latents] * 2), timestep, texts).chunk(2)
        weight = self.guidance.view(-1, 1, 1, 1) if isinstance(self.guidance, Tensor) else self.guidance
        return unconditional + weight * (conditional - unconditional)


class Watcher(Protocol):
    """Functions that are called while a batch is drawn, as `SamplingHook` of `harness.contracts.hooks` defines."""

    needs_gradient: ClassVar[bool]

    def begin(self, drawing: Drawing) -> None:
        """Before the first step."""

    def at_step(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Before each step."""

    def end(self, drawing: Drawing) -> None:
        """After the last step, or what failed."""


def starting_latents(model: DiffusionModel, seeds: Sequence[int], like: Tensor) -> tuple[Tensor, list[torch.Generator]]:
    """Return the latents [images, channels, height, width] that drawing begins with, and the generators that made them.

    Each image has its own generator, on the CPU, so that a GPU sees the same numbers. `like` gives the precision.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size, channels = model.image_size, model.unet.config.in_channels
    latents = model.pipeline.prepare_latents(len(seeds), channels, size, size, like.dtype, model.device, generators)
    return latents, generators


def draw(drawing: Drawing, generators: Sequence[torch.Generator], watchers: Sequence[Watcher] = ()) -> list[Image]:
    """Take every denoising step of the pipeline's scheduler, whose timesteps are set; return the images, decoded.

    Raises ValueError when a watcher changed a shape. `end` is called on each watcher that began, also after an error.
    """
    pipeline = drawing.model.pipeline
    options = pipeline.prepare_extra_step_kwargs(list(generators), 0.0)
    begun: list[Watcher] = []
    with torch.no_grad(), drawing.run.autocast():
        try:
            for watcher in watchers:
                begun.append(watcher)
                with _watched(drawing, watcher):
                    watcher.begin(drawing)
            for index, timestep in enumerate(pipeline.scheduler.timesteps):
                for watcher in watchers:
                    with _watched(drawing, watcher):
                        watcher.at_step(drawing, index, drawing.timesteps[index])
                along = drawing.guided(timestep)
                drawing.latents = pipeline.scheduler.step(
                    along, timestep, drawing.latents, **options, return_dict=False
                )[0]
        finally:
            for watcher in reversed(begun):
                watcher.end(drawing)
        decoded = pipeline.vae.decode(
            drawing.latents / pipeline.vae.config.scaling_factor, return_dict=False, generator=list(generators)
        )[0]
        return pipeline.image_processor.postprocess(decoded, output_type="pil", do_denormalize=[True] * len(decoded))


@contextlib.contextmanager
def _watched(drawing: Drawing, watcher: Watcher) -> Iterator[None]:
    """Let a watcher change a drawing, with gradients if it needs them. No graph is kept, and shapes must not change."""
    names = ("latents", "embeddings", "negative_embeddings")
    before = {name: getattr(drawing, name).shape for name in names}
    with torch.set_grad_enabled(watcher.needs_gradient):
        yield
    for name, shape in before.items():
        value = getattr(drawing, name).detach()
        if value.shape != shape:
            raise ValueError(f"a sampling hook gave {name} the shape {tuple(value.shape)}; it was {tuple(shape)}")
        setattr(drawing, name, value)
    if isinstance(drawing.guidance, Tensor):
        if drawing.guidance.shape != (len(drawing.prompts),):
            raise ValueError(f"a sampling hook gave guidance of shape {tuple(drawing.guidance.shape)}; one an image")
        drawing.guidance = drawing.guidance.detach().to(drawing.latents.device)
