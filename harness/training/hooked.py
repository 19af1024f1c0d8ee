"""The publisher's hooks at work in a training step: captions rewritten, examples weighed, the loss renormalized.

Shared by all trainings that honour adaptation hooks. The weights of a step are those of the global batch: over all
processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.core.seeds import mix
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run
from harness.training.diffusion import Draw, LossPart, Weigh, are_rejected
from harness.training.weights import Vector, Weights

if TYPE_CHECKING:
    from harness.contracts.hooks import AdaptationHook


class Hooked:
    """The adaptation hooks of a training; falsy without any."""

    def __init__(self, model: DiffusionModel, run: Run, hooks: Sequence[AdaptationHook]):
        from harness.contracts.hooks import AdaptationHook

        self._model, self._run, self._hooks = model, run, hooks
        self._weighing = [hook for hook in hooks if type(hook).weigh is not AdaptationHook.weigh]
        self.rewrites = any(type(hook).rewrite is not AdaptationHook.rewrite for hook in hooks)
        """Whether captions must be encoded again at each step."""
        self._renormalizes = any(hook.renormalizes for hook in self._weighing)

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def rewritten(self, captions: Iterable[str], seed: int, first: int) -> list[str]:
        """Return captions as the hooks rewrite them, one after the other.

        `first`: position of the first caption in the whole training. Equal (seed, position) give equal texts. Raises
        ValueError if a hook does not return one text per caption.
        """
        texts = list(captions)
        seeds = [mix(seed, "caption", first + place) for place in range(len(texts))]
        for hook in self._hooks:
            given = hook.rewrite(texts, seeds, self._model)
            if len(given) != len(texts) or not all(isinstance(text, str) for text in given):
                raise ValueError(f"{hook.name} must rewrite each of {len(texts)} captions to one text")
            texts = list(given)
        return texts

    def weigh(self, step: int) -> Weigh | None:
        """Return a function that gives the product of the hooks' weights for each example of a step.

        None without hooks that weigh. The function raises ValueError if a hook does not return one finite number per
        example; for this, and to know whether a step is skipped, the host waits for the weights.
        """
        if not self._weighing:
            return None
        from harness.contracts.hooks import Batch

        def weigh(batch: Draw, noisy: Tensor, prediction: Tensor, losses: Tensor) -> Tensor:
            seen = Batch(step, noisy, batch.timesteps, batch.embeddings, prediction, losses, self._run)
            weights = torch.ones_like(losses.detach())
            ledger = self._run.ledger
            before = ledger.forward_passes
            for hook in self._weighing:
                given = hook.weigh(self._model, seen).detach()
                if given.shape != weights.shape or not bool(given.isfinite().all()):
                    raise ValueError(f"{hook.name} must weigh each of {len(weights)} examples by one finite number")
                weights = weights * given
            # the gradient around this counts a backward pass for each forward one; those of hooks have none
            ledger.backward_passes -= ledger.forward_passes - before
            return weights

        return weigh

    def step(self, weights: Weights, level: str, groups: Sequence[Sequence[LossPart]]) -> bool:
        """Take an optimizer step along the gradient of a loss; return whether it was skipped.

        `groups`: the parts of each mean, such as the concept's and the class images'. A hook that renormalizes divides
        each mean by its own weights. A step whose examples are all rejected, over all processes, is skipped: even with
        a zero gradient AdamW would change the weights, by its moments and weight decay.
        """
        names = weights.levels[level].names
        parts = [part for group in groups for part in group]
        if not self._renormalizes:
            slope = weights.gradient(parts, names)
        else:
            slope = _summed([self._renormalized(weights.gradient(group, names), group) for group in groups])
        if self._weighing and self._run.world.all(are_rejected(parts)):
            return True
        weights.step(level, slope)
        return False

    def _renormalized(self, slope: Vector, group: Sequence[LossPart]) -> Vector:
        """Scale the gradient of a mean over examples to that of their weighted mean; zero where no weight is left."""
        total = self._run.world.sum(sum(float(part.example_weights.sum()) for part in group))
        count = self._run.world.sum(float(sum(len(part.batch) for part in group)))
        factor = count / total if total else 0.0
        with torch.no_grad():
            for value in slope.values():
                value.mul_(factor)
        return slope


def _summed(slopes: Sequence[Vector]) -> Vector:
    """Add the gradients of all groups into the first."""
    first, *others = slopes
    with torch.no_grad():
        for other in others:
            for name, value in other.items():
                first[name].add_(value)
    return first
