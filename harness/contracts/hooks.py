"""Hooks that a publisher asks others to run: when they fine-tune the released model, or draw images from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.drawing import Drawing
    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run


@dataclass(frozen=True)
class HookSpec:
    """A hook by its registered name and parameters: data, so that it can be stored beside the weights."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The data of one training step that an adaptation hook sees."""

    step: int
    noisy_latents: Tensor  # [batch, channels, height, width]
    timesteps: Tensor  # [batch]
    text_embeddings: Tensor  # [batch, tokens, width]
    prediction: Tensor  # the UNet's, with gradient
    losses: Tensor  # [batch], with gradient
    run: Run
    """For precision and the ledger: `run.autocast()`, `run.ledger`."""


class AdaptationHook:
    """Runs at each training step of an honest attacker. Register with @register("adaptation_hook").

    Write `rewrite` or `weigh`, or both.
    """

    renormalizes: ClassVar[bool] = False
    """Whether the loss is the weighted mean, divided by the sum of the weights, in place of the number of examples. The
    sum is over the global batch: all processes and micro-batches."""

    def __init__(self, parameters: Any):
        self.parameters = parameters

    def rewrite(self, captions: Sequence[str], seeds: Sequence[int], model: DiffusionModel) -> list[str]:
        """Return the captions that examples are trained under at this step; `seeds`: one per example and visit.

        Equal seeds must give equal texts. If a hook overrides this, captions are encoded again at each step.
        """
        return list(captions)

    def weigh(self, model: DiffusionModel, batch: Batch) -> Tensor:
        """Return a weight for each example's loss, shape [batch], finite and without gradient.

        If all examples of a step, over all processes, have the weight zero, the step is skipped: neither weights nor
        optimizer moments change. The ledger counts such steps as `skipped_steps`. In fp16 a batch may be weighed more
        than once: its gradient is computed again if it overflows.
        """
        import torch

        return torch.ones_like(batch.losses.detach())


class SamplingHook:
    """Runs while images are drawn from a released model. Register with @register("sampling_hook").

    Write `begin`, `at_step` or `at_prediction`, or several of them. One hook object handles all batches of a stage, one
    after the other, so `begin` must reset its state. UNet passes are counted if they go through `drawing.predict`.
    """

    needs_gradient: ClassVar[bool] = False
    """Whether `begin` and `at_step` are called with gradients enabled. Weights do not require gradients; a hook calls
    `requires_grad_` on embeddings or latents, and `drawing.predict(..., with_gradient=True)`. No graph is kept."""

    def __init__(self, parameters: Any):
        self.parameters = parameters

    def begin(self, drawing: Drawing) -> None:
        """Change embeddings, latents or guidance of a batch, or the model's attention, before the first step."""

    def at_step(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Change embeddings, latents or guidance before denoising step `index` (from 0) at `timestep`.

        Changes also apply to the following steps.
        """

    def at_prediction(self, drawing: Drawing, index: int, timestep: int) -> None:
        """See the predictions of denoising step `index`, without gradients: `drawing.conditional`, `.unconditional`.

        A change of the guidance also applies to this step, unless the guidance was None, which has no unconditional
        prediction (None).
        """

    def end(self, drawing: Drawing) -> None:
        """Undo changes to the model; called once for each `begin`, also when drawing failed."""


def make_hooks(kind: str, specs: Sequence[HookSpec]) -> list[Any]:
    """Return the hooks of `specs`; `kind` is "adaptation_hook" or "sampling_hook"."""
    from harness.core import parameters, registry

    hooks = []
    for spec in specs:
        cls = registry.get(kind, spec.name)
        values, mistakes = parameters.resolve(cls, spec.parameters)
        if mistakes:
            raise ValueError("; ".join(message for _, message in mistakes))
        hooks.append(cls(values))
    return hooks
