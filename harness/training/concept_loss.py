"""The denoising loss of a concept at a step, on its images with their captions, and optionally on class images.

Prior preservation (DreamBooth; Ruiz et al. 2023) adds the loss on class images drawn by the base model itself:
L(instance) + weight * L(class). Everything is encoded once; the random draws of a step depend only on (seed, step).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.core.seeds import mix
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run
from harness.training import diffusion
from harness.training.diffusion import Draw, EncodedImages, LossPart, TextSource, Weigh, denoising_loss, encode_images

if TYPE_CHECKING:
    from harness.contracts.hooks import AdaptationHook


class ConceptLoss:
    """The loss on the images of one concept, or of several concepts together."""

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
        text: TextSource | None = None,
        templates: Sequence[str] = (),
        hooks: Sequence[AdaptationHook] = (),
    ):
        """Encode PIL images with one caption each; if there are templates, one drawn at each step replaces the caption.

        `batch_size` counts images of the concept, over all processes; as many class images are added (`prior`, encoded
        by the caller, since concepts may share them). `text` computes the caption embeddings at each step; templates
        need it. `hooks` weight every example. Raises ValueError if there are no images.
        """
        self._model, self._run = model, run
        self._scheduler = model.noise_scheduler()
        self._batch_size, self._seed = batch_size, seed
        self._hooks = hooks
        self._templates: Tensor | None = None
        if templates:
            captions = [templates[0]] * len(images)  # a placeholder: each step draws its own
            self._templates = text.ids(templates)
        self._images = encode_images(model, run, images, captions, flip=flip, text=text)
        self._prior = prior

    def __len__(self) -> int:
        return len(self._images)

    def at(self, step: int, weight: float = 1.0, prior_weight: float = 0.0) -> list[LossPart]:
        """Return weight * L(instance) + prior_weight * L(class) at a step.

        Raises ValueError for a prior weight without class images.
        """
        batch = self._draw(self._images, step, self._seed)
        if self._templates is not None:
            source = torch.Generator().manual_seed(mix(self._seed, "template", step))
            which = torch.randint(len(self._templates), (len(batch),), generator=source)
            batch = replace(batch, embeddings=self._templates[which])
        parts = self._parts(batch, weight, self._images.text, step)
        if prior_weight:
            if self._prior is None:
                raise ValueError("prior preservation is weighed, but there are no class images")
            batch = self._draw(self._prior, step, mix(self._seed, "prior"))
            parts += self._parts(batch, prior_weight, self._prior.text, step)
        return parts

    def _draw(self, encoded: EncodedImages, step: int, seed: int) -> Draw:
        timesteps = self._scheduler.config.num_train_timesteps
        return diffusion.draw(encoded, self._batch_size, timesteps, seed=seed, step=step, device=self._model.device)

    def _parts(self, batch: Draw, weight: float, text: TextSource | None, step: int) -> list[LossPart]:
        return denoising_loss(
            self._model, self._run, self._scheduler, batch, weight=weight, text=text, weigh=self._weigh(step)
        )

    def _weigh(self, step: int) -> Weigh | None:
        """Return a function that gives the product of the hooks' weights for each example of a step.

        That function raises ValueError if a hook does not return one finite number per example.
        """
        if not self._hooks:
            return None
        from harness.contracts.hooks import Batch

        def weigh(batch: Draw, noisy: Tensor, prediction: Tensor, losses: Tensor) -> Tensor:
            seen = Batch(step, noisy, batch.timesteps, batch.embeddings, prediction, losses)
            weights = torch.ones_like(losses.detach())
            for hook in self._hooks:
                given = hook.weigh(self._model, seen).detach()
                if given.shape != weights.shape or not bool(given.isfinite().all()):
                    raise ValueError(f"{hook.name} must weigh each of {len(weights)} examples by one finite number")
                weights = weights * given
            return weights

        return weigh
