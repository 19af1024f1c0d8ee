"""Images encoded once, random draws that depend only on (seed, step), and the denoising loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from harness.core.finite import require_finite
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run
from harness.model.transfer import to_device


class TextSource(Protocol):
    """Computes text embeddings again at each step, because weights that they depend on are trained."""

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Return token ids [texts, tokens], on the CPU."""

    def encode(self, ids: Tensor) -> Tensor:
        """Return embeddings [texts, tokens, width] with a graph to the trained parameters; ids are on the CPU."""


@dataclass(frozen=True)
class EncodedImages:
    """Images and captions, encoded once for training the UNet.

    The posterior's mean and deviation are kept, so that each step draws a latent as if it encoded the image again.
    """

    mean: Tensor  # [flips, images, channels, height, width]; flips: 0 as given, 1 mirrored
    deviation: Tensor  # same shape; standard deviation of the posterior
    embeddings: Tensor  # [images, tokens, width]; with `text`, token ids [images, tokens] on the CPU
    scaling: float  # the VAE's scaling factor
    text: TextSource | None = None  # computes the embeddings from the ids at each step

    def __len__(self) -> int:
        return self.mean.shape[1]


def pixels(images: Sequence, size: int) -> Tensor:
    """Return PIL images as [images, 3, size, size] in [-1, 1]: shorter side resized, centre cropped."""
    import numpy as np
    from PIL import Image, ImageOps

    arrays = []
    for image in images:
        fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        arrays.append(np.asarray(fitted, dtype=np.float32) / 127.5 - 1.0)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def encode_images(
    model: DiffusionModel,
    run: Run,
    images: Sequence,
    captions: Sequence[str],
    *,
    flip: bool,
    text: TextSource | None = None,
) -> EncodedImages:
    """Encode PIL images, and their captions unless `text` encodes them at each step.

    Raises ValueError if there are no images, or if the numbers of images and captions differ.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    mean, deviation = encode_latents(model, run, images, flip=flip)
    with run.ledger.phase("encode"), torch.no_grad():
        embeddings = text.ids(captions) if text else model.encode_text(captions).float()
    return EncodedImages(mean, deviation, embeddings, model.vae.config.scaling_factor, text)


def encode_latents(model: DiffusionModel, run: Run, images: Sequence, *, flip: bool) -> tuple[Tensor, Tensor]:
    """Return (mean, standard deviation) of the posterior of PIL images, as `EncodedImages` holds them.

    Raises FloatingPointError for values that are not finite.
    """
    with run.ledger.phase("encode"), torch.no_grad():  # fp32 also under bf16: done once, and as in sampling
        given = pixels(images, model.image_size)
        means, deviations = [], []
        for batch in [given, given.flip(-1)] if flip else [given]:
            posteriors = [model.vae.encode(part.to(model.device)).latent_dist for part in batch.split(8)]
            means.append(torch.cat([p.mean.float() for p in posteriors]))
            deviations.append(torch.cat([p.std.float() for p in posteriors]))
        for name, values in (("latents", means), ("deviations of latents", deviations)):
            require_finite(torch.cat(values), f"{name} of training images", "check the VAE's weights")
    return torch.stack(means), torch.stack(deviations)


@dataclass(frozen=True)
class Draw:
    """One batch: the UNet's inputs and the noise that it should predict."""

    latents: Tensor  # [batch, channels, height, width]
    noise: Tensor  # same shape
    timesteps: Tensor  # [batch], uniform over the schedule
    embeddings: Tensor  # [batch, tokens, width], or token ids [batch, tokens] on the CPU
    chosen: Tensor  # [batch], indices of the encoded images; on the CPU

    def __len__(self) -> int:
        return self.latents.shape[0]

    def rows(self, start: int, stop: int) -> Draw:
        """Return the examples from `start` to before `stop`."""
        return Draw(*(getattr(self, f)[start:stop] for f in ("latents", "noise", "timesteps", "embeddings", "chosen")))


def shuffled(count: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """Return the indices of a step's batch among `count`, in epochs that are shuffled by the seed alone."""
    from harness.core.seeds import mix

    indices = []
    orders: dict[int, list[int]] = {}
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            order = torch.Generator().manual_seed(mix(seed, "epoch", epoch))
            orders[epoch] = torch.randperm(count, generator=order).tolist()
        indices.append(orders[epoch][place])
    return indices


def draw_noise(shape: Sequence[int], timesteps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return noise of the posterior [batch, channels, height, width], noise of the schedule, and timesteps [batch].

    `shape`: that of the latents; all are on the CPU.
    """
    posterior, noise = torch.randn(tuple(shape), generator=generator), torch.randn(tuple(shape), generator=generator)
    return posterior, noise, torch.randint(timesteps, (shape[0],), generator=generator)


def draw(encoded: EncodedImages, batch_size: int, timesteps: int, *, seed: int, step: int, device) -> Draw:
    """Draw a batch that depends only on (seed, step).

    Images are drawn in shuffled epochs: every image is used once before any is used again. All draws are made on the
    CPU, so that they are the same for a GPU.
    """
    from harness.core.seeds import mix

    generator = torch.Generator().manual_seed(mix(seed, "batch", step))
    chosen = torch.tensor(shuffled(len(encoded), batch_size, seed=seed, step=step))
    flips = torch.randint(encoded.mean.shape[0], (batch_size,), generator=generator)
    posterior_noise, noise, steps = draw_noise((batch_size, *encoded.mean.shape[2:]), timesteps, generator)
    where = encoded.mean.device
    places = to_device(flips, where), to_device(chosen, where)
    latents = encoded.mean[places] + encoded.deviation[places] * to_device(posterior_noise, where)
    embeddings = encoded.embeddings[to_device(chosen, encoded.embeddings.device)]
    return Draw(
        (latents * encoded.scaling).to(device),
        to_device(noise, device),
        to_device(steps, device),
        embeddings if encoded.text is not None else embeddings.to(device),
        chosen,
    )


def denoising_losses(model: DiffusionModel, run: Run, scheduler, batch: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses [batch], noisy latents, prediction): mean squared error of the noise (or velocity) prediction.

    The mean of the losses is the loss of the papers: E ||eps_theta(z_t, t, tau(c)) - eps||^2, mean over elements.
    Raises ValueError for a prediction type that is neither epsilon nor v_prediction.
    """
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    with run.autocast():
        prediction = model.denoise(noisy, batch.timesteps, batch.embeddings)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = batch.noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    else:
        raise ValueError(f"prediction type '{kind}' is not supported; epsilon and v_prediction are")
    run.ledger.forward_passes += batch.latents.shape[0]
    return (prediction.float() - target.float()).square().flatten(1).mean(1), noisy, prediction


Weigh = Callable[["Draw", Tensor, Tensor, Tensor], Tensor]
"""(batch, noisy latents, prediction, losses [batch]) -> weights of the examples, [batch], without a graph."""


@dataclass
class LossPart:
    """One micro-batch of a denoising loss; calling it evaluates the loss at the installed weights."""

    model: DiffusionModel
    run: Run
    scheduler: object
    batch: Draw
    weight: float  # factor of the sum of its examples' losses
    text: TextSource | None = None  # computes embeddings of the batch's token ids, with a graph
    weigh: Weigh | None = None  # one weight per example
    value: float | Tensor = math.nan  # mean loss of its examples at the last call
    example_weights: Tensor | None = None  # [examples], result of `weigh` at the last call

    def __call__(self) -> Tensor:
        """Return the weighted loss, with its graph."""
        batch = self.batch
        if self.text is not None:
            batch = replace(batch, embeddings=self.text.encode(batch.embeddings))
        losses, noisy, prediction = denoising_losses(self.model, self.run, self.scheduler, batch)
        self.value = losses.detach().mean()
        if self.weigh is not None:
            self.example_weights = self.weigh(batch, noisy, prediction, losses)
            losses = losses * self.example_weights
        return self.weight * losses.sum()


def denoising_loss(
    model: DiffusionModel,
    run: Run,
    scheduler,
    batch: Draw,
    *,
    weight: float = 1.0,
    text: TextSource | None = None,
    weigh: Weigh | None = None,
) -> list[LossPart]:
    """Return the parts of this process; over all processes they make `weight` times the mean loss of a global batch.

    Each process takes an equal share of the batch, and the mean over processes of the parts' sums is the result.
    Raises ValueError if the number of processes does not divide the batch.
    """
    own = own_share(len(batch), run)
    rows = micro_batches(batch.rows(own.start, own.stop), run)
    return [LossPart(model, run, scheduler, part, weight / len(own), text, weigh) for part in rows]


def own_share(batch_size: int, run: Run) -> range:
    """Return the places in a global batch that this process takes: an equal share.

    Raises ValueError if the number of processes does not divide the batch.
    """
    share, rest = divmod(batch_size, run.world.size)
    if rest or not share:
        raise ValueError(f"{run.world.size} processes do not divide a global batch of {batch_size}")
    return range(run.world.rank * share, (run.world.rank + 1) * share)


def micro_batches(batch: Draw, run: Run) -> list[Draw]:
    """Return the share of a process in parts whose graphs are in memory one at a time."""
    size = run.sharding.micro_batch_size or len(batch)
    return [batch.rows(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]


def are_rejected(parts: Sequence[LossPart]) -> bool:
    """Return whether every example of the parts had weight zero at the last call; the host waits for the weights."""
    return all(part.example_weights is not None and not bool(part.example_weights.any()) for part in parts)


def mean_value(parts: Sequence[LossPart]) -> Tensor:
    """Return the unweighted mean loss over the parts at their last call, fp64, where it was computed."""
    return torch.as_tensor(sum(part.value for part in parts) / len(parts)).double()
