"""The denoising loss of a concept at a step: its images under their captions, and images of its class beside them.

Prior preservation (DreamBooth; Ruiz et al. 2023) adds the loss on images of the class that the base model drew itself:
L(instance) + weight * L(class). Everything is encoded once; what a step draws depends on (seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harness.models import DiffusionModel
from harness.run import Run
from harness.seeds import mix
from harness.training import diffusion
from harness.training.diffusion import Draw, EncodedImages, LossPart, denoising_loss, encode_images
from harness.training.token_embedding import LearnedWord


class ConceptLoss:
    """Images of one concept, or of several taken together, ready to be trained on."""

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
        prior: EncodedImages | None = None,
        word: LearnedWord | None = None,
        templates: Sequence[str] = (),
    ):
        """PIL images and one caption each; with `word`, a template drawn at each step takes the captions' place.

        `batch_size` counts images of the concept, over all processes; as many class images (`prior`, encoded by the
        caller, since concepts may share them) come on top. Raises ValueError when there are no images.
        """
        self._model, self._run = model, run
        self._scheduler = model.noise_scheduler()
        self._batch_size, self._seed = batch_size, seed
        self._images = encode_images(model, run, images, captions, flip=flip)
        self._prior = prior
        self._embed: Callable[[Draw], Tensor] | None = None
        if word is not None:
            self._ids = word.ids(templates)
            self._embed = lambda batch: word.encode(batch.embeddings)

    def __len__(self) -> int:
        return len(self._images)

    def at(self, step: int, weight: float = 1.0, prior_weight: float = 0.0) -> list[LossPart]:
        """Return weight * L(instance) + prior_weight * L(class) at a step.

        Raises ValueError when class images are weighed that there are not.
        """
        batch = self._draw(self._images, step, self._seed)
        if self._embed is not None:
            source = torch.Generator().manual_seed(mix(self._seed, "template", step))
            which = torch.randint(len(self._ids), (len(batch),), generator=source)
            batch = replace(batch, embeddings=self._ids[which])
        parts = denoising_loss(self._model, self._run, self._scheduler, batch, weight=weight, embed=self._embed)
        if prior_weight:
            if self._prior is None:
                raise ValueError("prior preservation is weighed, but there are no class images")
            batch = self._draw(self._prior, step, mix(self._seed, "prior"))
            parts += denoising_loss(self._model, self._run, self._scheduler, batch, weight=prior_weight)
        return parts

    def _draw(self, encoded: EncodedImages, step: int, seed: int) -> Draw:
        timesteps = self._scheduler.config.num_train_timesteps
        return diffusion.draw(encoded, self._batch_size, timesteps, seed=seed, step=step, device=self._model.device)
