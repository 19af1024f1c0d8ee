"""One batch of images while it is drawn: what a sampling hook sees and may change, and the denoising loop.

The loop does what diffusers' `StableDiffusionPipeline` does, with the pipeline's own parts: starting latents,
scheduler, UNet, decoder and image processor. Without hooks its images are the pipeline's, bit for bit. We do not use
the pipeline's callback because it runs after each step: it cannot change the first step, the timesteps are not known
in advance, guidance is a private attribute, and moving guidance across 1 would need two texts stacked by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from harness.core.finite import require_finite
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run

if TYPE_CHECKING:
    from PIL.Image import Image


_ADVICE = "the weights diverged (lower learning_rate), or scheduler_config.json is wrong (zero SNR needs v_prediction)"


@dataclass
class Drawing:
    """A batch of images being denoised. Hooks may set the tensors and the guidance, but must keep the shapes."""

    model: DiffusionModel
    run: Run
    prompts: tuple[str, ...]  # one per image
    seeds: tuple[int, ...]  # of the starting noise, one per image
    timesteps: tuple[int, ...]  # of all denoising steps, from noise to image
    latents: Tensor  # [images, channels, height, width]
    embeddings: Tensor  # [images, tokens, width], of the prompts
    negative_embeddings: Tensor  # same shape, of the text that guidance leads away from: ""
    guidance: float | Tensor | None
    """w in e("") + w [e(prompt) - e("")], where e is the UNet's prediction: one number, or one per image, [images].
    None: e(prompt) alone, in half the passes: the start value if the suite's guidance is 1 or less, as in diffusers."""
    indices: tuple[int, ...] = ()
    """Of each image its number among those of its prompt, from 0; (): not known."""
    conditional: Tensor | None = None
    """The UNet's prediction for the prompts at the current step, [images, channels, height, width]."""
    unconditional: Tensor | None = None
    """The same for "", if there is guidance."""

    def predict(
        self, latents: Tensor, timestep: int | Tensor, embeddings: Tensor, *, with_gradient: bool = False
    ) -> Tensor:
        """Return the UNet's prediction [batch, channels, height, width] for latents of any batch.

        `timestep`: one for all, or [batch]. `with_gradient` keeps the graph of latents and embeddings that require
        gradients. Each sample counts as a forward pass in the ledger, and as a backward pass when it is differentiated.
        """
        scheduler = self.model.pipeline.scheduler
        with torch.set_grad_enabled(with_gradient):
            # the schedulers that `sampling` knows do not scale, so the timestep does not matter
            scaled = scheduler.scale_model_input(latents, timestep)
            said = self.model.denoise(scaled, timestep, embeddings)
        ledger, count = self.run.ledger, latents.shape[0]
        ledger.forward_passes += count

        def count_backward(slope: Tensor) -> None:
            ledger.backward_passes += count

        if said.requires_grad:
            said.register_hook(count_backward)
        return said

    def guided(self, timestep: int | Tensor) -> Tensor:
        """Return the guided prediction at the current latents, from which the scheduler computes its step."""
        self.foresee(timestep)
        return self.combined()

    def foresee(self, timestep: int | Tensor) -> None:
        """Predict at the current latents: set `conditional`, and `unconditional` if there is guidance."""
        if self.guidance is None:
            self.conditional, self.unconditional = self.predict(self.latents, timestep, self.embeddings), None
            return
        texts = torch.cat([self.negative_embeddings, self.embeddings])
        self.unconditional, self.conditional = self.predict(torch.cat([self.latents] * 2), timestep, texts).chunk(2)

    def combined(self) -> Tensor:
        """Return the guided prediction of the predictions that were made."""
        if self.unconditional is None:
            return self.conditional
        weight = self.guidance.view(-1, 1, 1, 1) if isinstance(self.guidance, Tensor) else self.guidance
        return self.unconditional + weight * (self.conditional - self.unconditional)


class Watcher(Protocol):
    """Functions that are called while a batch is drawn; see `SamplingHook` of `harness.contracts.hooks`."""

    needs_gradient: ClassVar[bool]

    def begin(self, drawing: Drawing) -> None:
        """Called before the first step."""

    def at_step(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Called before each step."""

    def at_prediction(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Called in each step, when predictions are made and not yet combined."""

    def end(self, drawing: Drawing) -> None:
        """Called after the last step, or after a failure."""


def starting_latents(model: DiffusionModel, seeds: Sequence[int], like: Tensor) -> tuple[Tensor, list[torch.Generator]]:
    """Return the latents [images, channels, height, width] that drawing begins with, and their generators.

    Each image has its own generator, on the CPU, so that a GPU gets the same numbers. `like` sets the precision.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size, channels = model.image_size, model.unet.config.in_channels
    latents = model.pipeline.prepare_latents(len(seeds), channels, size, size, like.dtype, model.device, generators)
    return latents, generators


def draw(drawing: Drawing, generators: Sequence[torch.Generator], watchers: Sequence[Watcher] = ()) -> list[Image]:
    """Take every denoising step of the pipeline's scheduler, whose timesteps are set; return the decoded images.

    Raises ValueError when a watcher changed a shape, and FloatingPointError when latents or decoded images are not
    finite, which the image processor would make black. Every watcher that began is ended, even after a failure.
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
                drawing.foresee(timestep)
                for watcher in watchers:
                    watcher.at_prediction(drawing, index, drawing.timesteps[index])
                along = drawing.combined()
                drawing.latents = pipeline.scheduler.step(
                    along, timestep, drawing.latents, **options, return_dict=False
                )[0]
        finally:
            for watcher in reversed(begun):
                watcher.end(drawing)
        # a value that is not finite stays so in all later steps, so the last latents show it
        require_finite(drawing.latents, "latents of images", _ADVICE)
        decoded = _decoded(drawing, generators)
        require_finite(decoded, "decoded images", "the VAE overflows; check its weights")
        return pipeline.image_processor.postprocess(decoded, output_type="pil", do_denormalize=[True] * len(decoded))


def _decoded(drawing: Drawing, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the decoded images of the latents; in fp16, whose range some VAEs leave, such images again in fp32."""
    vae = drawing.model.vae

    def decode(chosen: Tensor | slice) -> Tensor:
        latents = drawing.latents[chosen] / vae.config.scaling_factor
        return vae.decode(latents, return_dict=False, generator=list(generators))[0]

    decoded, numbers = decode(slice(None)), drawing.run.ledger.numbers
    if not drawing.run.scales_loss:
        return decoded
    lost = ~decoded.isfinite().flatten(1).all(dim=1)
    if bool(lost.any()):
        if "decoded_in_fp32" not in numbers:
            drawing.run.notify("images whose decoding overflows in fp16 are decoded in fp32")
        numbers["decoded_in_fp32"] = numbers.get("decoded_in_fp32", 0) + int(lost.sum())
        with torch.autocast(drawing.model.device.type, enabled=False):
            decoded[lost] = decode(lost).to(decoded)
    return decoded


@contextlib.contextmanager
def _watched(drawing: Drawing, watcher: Watcher) -> Iterator[None]:
    """Let a watcher change a drawing, with gradients if it needs them; then check shapes and detach the tensors."""
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
