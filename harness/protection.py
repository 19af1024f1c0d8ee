"""What a publisher releases (`Protection`), and against whom it is meant (`ThreatModel`).

Attacks and the sampler honour a `Protection` without knowing which defense made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models import DiffusionModel


@dataclass(frozen=True)
class ThreatModel:
    """Under which attacker a defense makes sense. Tables say which attacker they show."""

    changes: tuple[str, ...] = ()  # what the defense changes: "unet.attention", "unet.cross_attention.kv", ...
    must_honour: tuple[str, ...] = ()  # what an attacker must obey: "frozen", "adaptation_hooks", "sampling_hooks"
    may_restore: tuple[str, ...] = ("unet", "text_encoder", "vae")  # public components that undo it when swapped in
    knows: tuple[str, ...] = ("weights", "method")  # what the attacker is assumed to know


@dataclass(frozen=True)
class HookSpec:
    """A hook by its registered name and parameters: data, so that it can be stored beside the weights."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protection:
    """What the publisher releases on top of the base model."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Changed weights only, by parameter name with its component: "unet.mid_block...to_k.weight"; {} for `none`."""
    frozen: frozenset[str] = frozenset()
    """Parameters whose training the publisher's fine-tuning API refuses (FreezeAsGuard)."""
    adaptation: tuple[HookSpec, ...] = ()
    """Hooks that an honest fine-tuning API runs (training-time mitigation)."""
    sampling: tuple[HookSpec, ...] = ()
    """Hooks that the serving side runs (inference-time mitigation)."""
    details: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What the method says of single tensors, by name: for the record, and never loaded again."""

    def save(self, folder: Path) -> None:
        """Write tensors.safetensors (when there are any) and protection.json into `folder`."""
        from safetensors.torch import save_file

        if self.tensors:
            save_file(
                {name: t.detach().to("cpu").contiguous() for name, t in self.tensors.items()},
                folder / "tensors.safetensors",
            )
        described = {
            "frozen": sorted(self.frozen),
            "adaptation": [asdict(h) for h in self.adaptation],
            "sampling": [asdict(h) for h in self.sampling],
        }
        (folder / "protection.json").write_text(json.dumps(described, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Protection:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        described = json.loads((folder / "protection.json").read_text(encoding="utf-8"))
        path = folder / "tensors.safetensors"
        return cls(
            tensors=load_file(path) if path.exists() else {},
            frozen=frozenset(described["frozen"]),
            adaptation=tuple(HookSpec(**h) for h in described["adaptation"]),
            sampling=tuple(HookSpec(**h) for h in described["sampling"]),
        )


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
    from harness import parameters, registry

    hooks = []
    for spec in specs:
        cls = registry.get(kind, spec.name)
        values, mistakes = parameters.resolve(cls, spec.parameters)
        if mistakes:
            raise ValueError("; ".join(message for _, message in mistakes))
        hooks.append(cls(values))
    return hooks
