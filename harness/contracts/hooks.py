"""Hooks that a publisher asks for: of those who fine-tune the released model, and of those who draw from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel


@dataclass(frozen=True)
class HookSpec:
    """A hook by its registered name and parameters: data, so that it can be stored beside the weights."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """What an adaptation hook sees of one training step."""

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
        """Return a weight for each example of the batch, shape [batch], without gradient."""
        raise NotImplementedError


class SamplingHook:
    """Runs before images are drawn from a released model. Register with @register("sampling_hook")."""

    def __init__(self, parameters: Any):
        self.parameters = parameters

    def embed(self, model: DiffusionModel, prompts: Sequence[str], embeddings: Tensor) -> Tensor:
        """Return the text embeddings [batch, tokens, width] to draw with, in place of `embeddings`."""
        raise NotImplementedError


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
