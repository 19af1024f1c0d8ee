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
from harness.training.diffusion import Draw, EncodedImages, LossPart, TextSource, denoising_loss, encode_images
from harness.training.hooked import Hooked

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
        need it. `hooks` rewrite captions and weigh every example. Raises ValueError if there are no images.
        """
        self._model, self._run = model, run
        self._scheduler = model.noise_scheduler()
        self._batch_size, self._seed = batch_size, seed
        self.hooks = Hooked(model, run, hooks)
        self._captions, self._template_texts = list(captions), list(templates)
        self._templates: Tensor | None = None
        if templates:
            captions = [templates[0]] * len(images)  # a placeholder: each step draws its own
            self._templates = text.ids(templates)
        self._images = encode_images(model, run, images, captions, flip=flip, text=text)
        self._prior = prior

    def __len__(self) -> int:
        return len(self._images)

    def at(self, step: int, weight: float = 1.0, prior_weight: float = 0.0) -> list[LossPart]:
        """Return weight * L(instance) + prior_weight * L(class) at a step, as `groups` does, in one list."""
        return [part for group in self.groups(step, weight, prior_weight) for part in group]

    def groups(self, step: int, weight: float = 1.0, prior_weight: float = 0.0) -> list[list[LossPart]]:
        """Return the parts of weight * L(instance), then those of prior_weight * L(class), if it is not zero.

        Hooks rewrite the captions of instances only: those of class images are the trainer's own. Raises ValueError for
        a prior weight without class images.
        """
        batch = self._draw(self._images, step, self._seed)
        which = None
        if self._templates is not None:
            source = torch.Generator().manual_seed(mix(self._seed, "template", step))
            which = torch.randint(len(self._templates), (len(batch),), generator=source)
            batch = replace(batch, embeddings=self._templates[which])
        if self.hooks.rewrites:
            batch = replace(batch, embeddings=self._rewritten(batch, which, step))
        made = [self._parts(batch, weight, self._images.text, step)]
        if prior_weight:
            if self._prior is None:
                raise ValueError("prior preservation is weighed, but there are no class images")
            batch = self._draw(self._prior, step, mix(self._seed, "prior"))
            made.append(self._parts(batch, prior_weight, self._prior.text, step))
        return made

    def _rewritten(self, batch: Draw, templates: Tensor | None, step: int) -> Tensor:
        """Return the embeddings (with a text source: the token ids) of a batch's captions as hooks rewrite them."""
        if templates is not None:
            captions = [self._template_texts[place] for place in templates.tolist()]
        else:
            captions = [self._captions[place] for place in batch.chosen.tolist()]
        texts = self.hooks.rewritten(captions, self._seed, step * self._batch_size)
        if self._images.text is not None:
            return self._images.text.ids(texts)
        return self._model.encode_text(texts).float()

    def _draw(self, encoded: EncodedImages, step: int, seed: int) -> Draw:
        timesteps = self._scheduler.config.num_train_timesteps
        return diffusion.draw(encoded, self._batch_size, timesteps, seed=seed, step=step, device=self._model.device)

    def _parts(self, batch: Draw, weight: float, text: TextSource | None, step: int) -> list[LossPart]:
        return denoising_loss(
            self._model, self._run, self._scheduler, batch, weight=weight, text=text, weigh=self.hooks.weigh(step)
        )
