"""The upper loss of pruned students: the concept's captions are trained to predict the negation of the concept.

Shirkavand et al., CVPR 2025 (arXiv 2412.15341), as released: ESD's target, of the unpruned teacher and at real images.
With f the model's prediction, f_T the frozen teacher's, x_t a noised image of the concept and c its caption:

    target = f_T(x_t, "") - eta [ f_T(x_t, c) - f_T(x_t, "") ]          (eta = 1: 2 f_T(x_t, "") - f_T(x_t, c))
    L = mean|f(x_t, c) - target|^2

The prediction is velocity or noise, whichever the model predicts; the timesteps are not weighed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.model.pipeline import DiffusionModel
from harness.model.run import Run
from harness.training.diffusion import Draw, draw, encode_images, micro_batches, own_share
from harness.training.teacher import predicted, require_same_prediction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def negated(unconditional: Tensor, conditional: Tensor, eta: float) -> Tensor:
    """Return the training target from the original's two predictions."""
    return unconditional - eta * (conditional - unconditional)


@dataclass
class SuppressionPart:
    """The loss on one micro-batch; calling it evaluates the loss at the installed weights."""

    model: DiffusionModel
    run: Run
    noisy: Tensor
    batch: Draw
    target: Tensor
    weight: float  # factor of the sum of its examples' losses
    value: float | Tensor = math.nan  # mean loss of its examples at the last call

    def __call__(self) -> Tensor:
        """Return the weighted loss, with its graph."""
        with self.run.autocast():
            said = self.model.denoise(self.noisy, self.batch.timesteps, self.batch.embeddings)
        self.run.ledger.forward_passes += len(self.batch)
        losses = (said.float() - self.target).square().flatten(1).mean(1)
        self.value = losses.detach().mean().double()
        return self.weight * losses.sum()


class Suppression:
    """The upper loss on batches of the concepts' images, in shuffled epochs over all of them."""

    def __init__(
        self,
        model: DiffusionModel,
        teacher: DiffusionModel,
        run: Run,
        images: Sequence,
        captions: Sequence[str],
        *,
        batch_size: int,
        strength: float,
        flip: bool,
        seed: int,
    ):
        """Encode PIL images of the concepts, with one caption each.

        `batch_size` is global: over all processes. `strength`: eta. Raises ValueError if there are no images, or the
        models predict different things.
        """
        require_same_prediction(model, teacher)
        self._model, self._teacher, self._run = model, teacher, run
        self._batch_size, self._strength, self._seed = batch_size, strength, seed
        self._scheduler = model.noise_scheduler()
        self._images = encode_images(model, run, images, captions, flip=flip)
        with run.ledger.phase("encode"):
            self._nothing = model.encode_text([""]).float()

    def at(self, step: int, weight: float = 1.0) -> list[SuppressionPart]:
        """Return the parts of this process; over all processes their mean is `weight` times the loss of a step's batch.

        The targets of all of them are computed here, so the teacher's passes are counted without a backward pass.
        """
        timesteps = self._scheduler.config.num_train_timesteps
        batch = draw(self._images, self._batch_size, timesteps, seed=self._seed, step=step, device=self._model.device)
        own = own_share(self._batch_size, self._run)
        return [
            self._part(part, weight / len(own)) for part in micro_batches(batch.rows(own.start, own.stop), self._run)
        ]

    def _part(self, batch: Draw, weight: float) -> SuppressionPart:
        noisy = self._scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        nothing = self._nothing.expand_as(batch.embeddings)
        unconditional, conditional = (
            predicted(self._teacher, self._run, noisy, batch.timesteps, text) for text in (nothing, batch.embeddings)
        )
        target = negated(unconditional, conditional, self._strength)
        return SuppressionPart(self._model, self._run, noisy, batch, target, weight)


def mean_loss(parts: Sequence[SuppressionPart]) -> float | Tensor:
    """Return the unweighted mean loss over the parts at their last call, fp64, where it was computed."""
    return sum(part.value * len(part.batch) for part in parts) / sum(len(part.batch) for part in parts)
