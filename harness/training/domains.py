"""Losses on two domains: illegal (should become hard to learn) and innocent (must stay learnable).

Batches are *stratified* (half from each domain) or *mixed* (drawn from all images together, so that a domain with few
images may be missing from a batch). Images and captions are encoded once; draws depend only on (seed, step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from harness.core.seeds import mix
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run
from harness.model.transfer import to_device
from harness.training import diffusion
from harness.training.diffusion import Draw, EncodedImages, LossPart, denoising_loss, encode_images

if TYPE_CHECKING:
    from harness.contracts.defense import ProtectedConcept

_NO_DIVISION_BY_ZERO = 1e-5
"""Added to the number of a domain's examples in a batch, as in FreezeAsGuard's code."""


class Domains:
    """The denoising losses of both domains."""

    def __init__(
        self,
        model: DiffusionModel,
        run: Run,
        illegal: Sequence[ProtectedConcept],
        innocent: Sequence[ProtectedConcept],
        *,
        batch_size: int,
        flip: bool,
        seed: int,
        is_mixed: bool,
        stream: str = "mixed",
    ):
        """Encode both domains. `batch_size` is global, over processes and domains.

        `stream` names the random draws of mixed batches, so that trainings with the same seed can draw differently.
        Raises ValueError if a domain has no images.
        """
        self._model, self._run, self._seed, self._stream = model, run, seed, stream
        self._batch_size, self._is_mixed = batch_size, is_mixed
        self._scheduler = model.noise_scheduler()
        self._illegal, self._innocent = (
            encode_images(
                model, run,
                [image for concept in concepts for image in concept.images],
                [caption for concept in concepts for caption in concept.captions],
                flip=flip,
            )
            for concepts in (illegal, innocent)
        )  # fmt: skip
        self._all = _together(self._illegal, self._innocent) if is_mixed else None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._illegal) + len(self._innocent)

    def losses(self, step: int, illegal: float, innocent: float) -> list[LossPart]:
        """Return illegal * L(illegal) + innocent * L(innocent), where L is the mean over a domain's examples."""
        if not self._is_mixed:
            return self._of(self._illegal, "illegal", step, illegal) + self._of(
                self._innocent, "innocent", step, innocent
            )
        batch = self._drawn(self._all, self._stream, step, self._batch_size)
        is_illegal = batch.chosen < len(self._illegal)
        count = int(is_illegal.sum())
        of_illegal = illegal * len(batch) / (count + _NO_DIVISION_BY_ZERO)
        of_innocent = innocent * len(batch) / (len(batch) - count + _NO_DIVISION_BY_ZERO)

        def weigh(part: Draw, noisy, prediction, losses):
            own = part.chosen < len(self._illegal)
            return to_device(torch.where(own, of_illegal, of_innocent).to(losses.dtype), losses.device)

        return denoising_loss(self._model, self._run, self._scheduler, batch, weigh=weigh)

    def mean(self, step: int) -> list[LossPart]:
        """Return the mean loss over all examples of a batch, of both domains."""
        if not self._is_mixed:
            return self.losses(step, 0.5, 0.5)
        batch = self._drawn(self._all, self._stream, step, self._batch_size)
        return denoising_loss(self._model, self._run, self._scheduler, batch)

    def _of(self, encoded: EncodedImages, name: str, step: int, weight: float) -> list[LossPart]:
        batch = self._drawn(encoded, name, step, self._batch_size // 2)
        return denoising_loss(self._model, self._run, self._scheduler, batch, weight=weight)

    def _drawn(self, encoded: EncodedImages, name: str, step: int, count: int) -> Draw:
        timesteps = self._scheduler.config.num_train_timesteps
        return diffusion.draw(
            encoded, count, timesteps, seed=mix(self._seed, name), step=step, device=self._model.device
        )


def _together(first: EncodedImages, second: EncodedImages) -> EncodedImages:
    """Return the concatenation of both."""
    return EncodedImages(
        torch.cat([first.mean, second.mean], dim=1),
        torch.cat([first.deviation, second.deviation], dim=1),
        torch.cat([first.embeddings, second.embeddings]),
        first.scaling,
    )
