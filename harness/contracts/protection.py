"""What a publisher releases (`Protection`), and against which attacker (`ThreatModel`).

Attacks and the sampler obey a `Protection` without knowing which defense made it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.contracts.hooks import HookSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

CURVES = "curves.csv"
"""The file of `Protection.curves` in the folder of a stage."""


@dataclass(frozen=True)
class ThreatModel:
    """The attacker against which a defense makes sense. Tables name the attacker that they show."""

    changes: tuple[str, ...] = ()  # what the defense changes: components, such as "unet", or named sets of the UNet's
    # parameters, such as "unet.cross_attention_kv" (`harness.training.selection`)
    must_honour: tuple[str, ...] = ()  # what an attacker must obey: "frozen", "adaptation_hooks", "sampling_hooks"


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
    """Numbers that the method records on single tensors, by name; never loaded again."""
    curves: Sequence[Mapping[str, float]] = ()
    """Numbers that the method records step by step: a row each, with the same names in all; never loaded again."""
    components: Mapping[str, nn.Module | Path] = field(default_factory=dict)
    """Whole components that replace the model's, by name ("unet"), because their configuration differs (a pruned UNet):
    a module, or the folder that it was saved to. `tensors` are written over them."""

    def with_asked(self, layer: Protection) -> Protection:
        """Return this protection with the frozen names and hooks of a further layer, without its weights."""
        return replace(
            self,
            frozen=self.frozen | layer.frozen,
            adaptation=(*self.adaptation, *layer.adaptation),
            sampling=(*self.sampling, *layer.sampling),
        )

    def save(self, folder: Path) -> None:
        """Write into `folder`: protection.json, one folder per component, and tensors and curves if there are any.

        Their files are tensors.safetensors and curves.csv.
        """
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
            **({"components": sorted(self.components)} if self.components else {}),
        }
        for name, component in self.components.items():
            component.save_pretrained(folder / name, safe_serialization=True)
        (folder / "protection.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
        if self.curves:
            with open(folder / CURVES, "w", encoding="utf-8", newline="") as file:
                rows = csv.DictWriter(file, list(self.curves[0]), lineterminator="\n")
                rows.writeheader()
                rows.writerows(self.curves)

    @classmethod
    def load(cls, folder: Path) -> Protection:
        """Return the protection that `save` wrote."""
        from safetensors.torch import load_file

        described = json.loads((folder / "protection.json").read_text(encoding="utf-8"))
        path = folder / "tensors.safetensors"
        return cls(
            tensors=load_file(path) if path.exists() else {},
            frozen=frozenset(described["frozen"]),
            adaptation=tuple(HookSpec(**h) for h in described["adaptation"]),
            sampling=tuple(HookSpec(**h) for h in described["sampling"]),
            components={name: folder / name for name in described.get("components", ())},
        )
