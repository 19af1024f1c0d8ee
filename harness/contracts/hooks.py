"""Hooks that a publisher asks for: in fine-tuning the released model, and in drawing images from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.drawing import Drawing
    from harness.model.pipeline import DiffusionModel


@dataclass(frozen=True)
class HookSpec:
    """A hook by its registered name and parameters: data, so that it can be stored beside the weights."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The data of one training step that an adaptation hook receives."""

    step: int
    noisy_latents: Tensor  # [batch, channels, height, width]
    timesteps: Tensor  # [batch]
    text_embeddings: Tensor  # [batch, tokens, width]
    prediction: Tensor  # the UNet's, with gradient
    losses: Tensor  # [batch], with gradient


class AdaptationHook:
    """Runs at each training step of an honest attacker. Register with @register("adaptation_hook")."""

    def __init__(self, parameters: Any):
        self.parameters = parameters

    def weigh(self, model: DiffusionModel, batch: Batch) -> Tensor:
        """Return a weight for each example's loss, shape [batch], finite and without gradient.

        A step whose examples all have the weight zero, over all processes, is not taken: neither weights nor the
        optimizer's moments move. The ledger counts such steps as `skipped_steps`.
        """
        raise NotImplementedError


class SamplingHook:
    """Runs while images are drawn from a released model. Register with @register("sampling_hook").

    Write `begin` or `at_step`, or both. One hook object serves all batches of a stage, one after the other: reset its
    state in `begin`. UNet passes are counted where they go through `drawing.predict`.
    """

    needs_gradient: ClassVar[bool] = False
    """Whether `begin` and `at_step` are called with gradients enabled. Weights ask for none; a hook calls
    `requires_grad_` on embeddings or latents, and `drawing.predict(..., with_gradient=True)`. No graph is kept."""

    def __init__(self, parameters: Any):
        self.parameters = parameters

    def begin(self, drawing: Drawing) -> None:
        """Change embeddings, latents or guidance of a batch before its first step, or the model's attention."""

    def at_step(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Change embeddings, latents or guidance before denoising step `index` (from 0) at `timestep`.

        A change also applies to the steps that follow.
        """

    def end(self, drawing: Drawing) -> None:
        """Undo changes of the model; called once for each `begin`, also when drawing failed."""


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
