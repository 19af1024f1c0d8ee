"""A defense for tests that costs nothing: noise on keys and values; a large amount is not finite, as if it diverged."""

from __future__ import annotations

from dataclasses import dataclass

from harness.api import Choice, Defense, Protection, ThreatModel, register


@dataclass(frozen=True)
class Parameters:
    """How much noise."""

    amount: float = 0.02


@register("defense")
class Shifted(Defense):
    """Noise on the keys and values of cross-attention."""

    name = "shifted"
    version = 1
    threat_model = ThreatModel(changes=("unet.cross_attention_kv",))
    uses = frozenset({"targets", "seed"})
    Parameters = Parameters

    @classmethod
    def search_space(cls, parameters):
        """One amount is too much."""
        return {"amount": Choice((0.1, 1.0, 9.0))}

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the changed projections."""
        import torch

        generator = torch.Generator().manual_seed(run.seed_for("noise"))
        amount = self.parameters.amount
        scale = amount if amount < 5 else float("nan")
        known = {n: p for n, p in model.parameters().items() if ".attn2.to_k." in n or ".attn2.to_v." in n}
        noise = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in known.items()}
        return Protection(tensors={n: p.detach() + scale * noise[n] for n, p in known.items()})
