"""The drift of predictions from the given model's, on images that are to stay as they are: R of ResAlign.

    R(theta) = mean | f_theta(x_t, c) - f_theta0(x_t, c) |^2

theta0 are the weights that are installed while `DriftPart.remember` is called, so no second model is held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from harness.model.pipeline import DiffusionModel
from harness.model.run import Run
from harness.training.diffusion import Draw, draw, encode_images, micro_batches, own_share
from harness.training.teacher import predicted


@dataclass
class DriftPart:
    """The drift on one micro-batch; calling it evaluates it at the installed weights, after `remember`."""

    model: DiffusionModel
    run: Run
    noisy: Tensor
    batch: Draw
    weight: float  # factor of the sum of its examples' losses
    target: Tensor | None = None  # f_theta0, shape of `noisy`
    value: float | Tensor = math.nan  # mean loss of its examples at the last call

    def remember(self) -> Tensor:
        """Keep what the installed weights predict as the target; return it."""
        self.target = predicted(self.model, self.run, self.noisy, self.batch.timesteps, self.batch.embeddings)
        return self.target

    def __call__(self) -> Tensor:
        """Return the weighted loss, with its graph."""
        with self.run.autocast():
            said = self.model.denoise(self.noisy, self.batch.timesteps, self.batch.embeddings)
        self.run.ledger.forward_passes += len(self.batch)
        losses = (said.float() - self.target).square().flatten(1).mean(1)
        self.value = losses.detach().mean()
        return self.weight * losses.sum()


class Drift:
    """The drift on batches of images with captions, in shuffled epochs over all of them."""

    def __init__(
        self,
        model: DiffusionModel,
        run: Run,
        images: Sequence,
        captions: Sequence[str],
        *,
        batch_size: int,
        flip: bool,
        seed: int,
    ):
        """Encode PIL images with one caption each. `batch_size` is global. Raises ValueError if there are no images."""
        self._model, self._run, self._batch_size, self._seed = model, run, batch_size, seed
        self._scheduler = model.noise_scheduler()
        self._images = encode_images(model, run, images, captions, flip=flip)

    def at(self, step: int, weight: float = 1.0) -> list[DriftPart]:
        """Return the parts of this process; over all processes their mean is `weight` times the drift of a batch."""
        timesteps = self._scheduler.config.num_train_timesteps
        batch = draw(self._images, self._batch_size, timesteps, seed=self._seed, step=step, device=self._model.device)
        own = own_share(self._batch_size, self._run)
        return [
            DriftPart(
                self._model, self._run, self._scheduler.add_noise(part.latents, part.noise, part.timesteps), part,
                weight / len(own),
            )
            for part in micro_batches(batch.rows(own.start, own.stop), self._run)
        ]  # fmt: skip
