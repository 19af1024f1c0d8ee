"""Batches of general images with captions, which are encoded when they come: there may be too many to keep."""

from __future__ import annotations

from functools import lru_cache

import torch
from PIL import ImageOps
from torch import Tensor

from harness.core.seeds import mix
from harness.model.pipeline import DiffusionModel
from harness.model.run import Pairs, Run
from harness.model.transfer import to_device
from harness.training.diffusion import Draw, draw_noise, encode_latents, own_share, shuffled

KEPT = 2048
"""At most so many encoded images are kept, on the model's device: 270 MB at latents of 4x64x64."""


class GeneralPairs:
    """Batches of pairs in shuffled epochs; captions are never dropped."""

    def __init__(
        self, model: DiffusionModel, run: Run, pairs: Pairs, *, batch_size: int, flip: bool, seed: int, kept: int = KEPT
    ):
        """`batch_size` is global: over all processes. `flip`: mirror half of the images at random.

        Raises ValueError if there are no pairs.
        """
        if not pairs.captions:
            raise ValueError("there are no general images with captions to train on")
        self._model, self._run, self._pairs = model, run, pairs
        self._batch_size, self._orientations, self._seed = batch_size, 2 if flip else 1, seed
        self._timesteps = model.noise_scheduler().config.num_train_timesteps
        self._kept = lru_cache(maxsize=kept)(self._encoded)

    def batch(self, step: int) -> Draw:
        """Return this process's share of the batch of a step.

        All draws are made on the CPU for the global batch and depend only on (seed, step), not on the number of
        processes. Raises ValueError if the number of processes does not divide the batch.
        """
        own, device = own_share(self._batch_size, self._run), self._model.device
        places = slice(own.start, own.stop)
        generator = torch.Generator().manual_seed(mix(self._seed, "batch", step))
        chosen = shuffled(len(self._pairs.captions), self._batch_size, seed=self._seed, step=step)[places]
        mirrored = torch.randint(self._orientations, (self._batch_size,), generator=generator)[places]
        encoded = [self._kept(pair, bool(flip)) for pair, flip in zip(chosen, mirrored.tolist(), strict=True)]
        mean, deviation = (torch.stack(each) for each in zip(*encoded, strict=True))
        shape = (self._batch_size, *mean.shape[1:])
        draws = draw_noise(shape, self._timesteps, generator)
        posterior, noise, timesteps = (to_device(each[places], device) for each in draws)
        latents = (mean + deviation * posterior) * self._model.vae.config.scaling_factor
        with self._run.ledger.phase("encode"):
            embeddings = self._model.encode_text([self._pairs.captions[pair] for pair in chosen]).float()
        return Draw(latents, noise, timesteps, embeddings, torch.tensor(chosen))

    def _encoded(self, pair: int, is_mirrored: bool) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of an image's latents, each [channels, height, width], on the model's device."""
        image = self._pairs.image(pair)
        # one by one: rounding depends on what is encoded together, and after a kill other images are kept
        mean, deviation = encode_latents(
            self._model, self._run, [ImageOps.mirror(image) if is_mirrored else image], flip=False
        )
        return mean[0, 0], deviation[0, 0]
