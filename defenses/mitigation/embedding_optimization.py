"""The prompt's embedding, optimized until the text's share of the first prediction is small (Wen et al., ICLR 2024).

Before drawing, at the first timestep and at the very noise that is drawn from:

    minimize over e  L(e) = |eps(x_T, t, e) - eps(x_T, t, "")|

one norm over all n images of a prompt together, which share e; AdamW at .05, weight decay .01, at most 10 iterations;
the loss is tested before the update, and iterations end when it is at most `target`. The first position (start) is not
changed. The images are then drawn under e. A target of 3 for 4 images is 1.5 for an image (root mean square): `target`
divided by the root of the number of images, kept as `target_an_image`.

Facts: memorization.md 4, memorization_checked.md. Differences from the released code: e and AdamW's state are fp32
(there bf16, in which the weight decay is lost and a target of 3 means up to 3.0078); the start is not decayed either;
the prediction for no text is made once; its optional penalty on the drift of e, which is off there, is left out. Its
other rows are drawn from other noise; here all rows meet the same. Cost for an image: one pass for no text, then a
forward and a backward pass for each iteration; the last one is forward only if the target is reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from defenses.mitigation.by_hooks import DrawingMitigation
from defenses.mitigation.by_prompt import groups
from harness.contracts.hooks import SamplingHook
from harness.core.registry import register
from harness.model import loss_scale

if TYPE_CHECKING:
    from harness.model.drawing import Drawing


@dataclass(frozen=True)
class Parameters:
    """Defaults: the command of the released README."""

    target: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    """The loss at which iterations end: a norm over all images of a prompt."""
    iterations: Annotated[int, Field(ge=1, le=1000)] = 10
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.05
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01


@register("sampling_hook")
class OptimizedEmbeddings(SamplingHook):
    """Optimizes the embedding of each prompt of a batch before its first step."""

    name = "embedding_optimization"
    version = 1
    needs_gradient = True
    Parameters = Parameters

    def begin(self, drawing: Drawing) -> None:
        """Replace the embeddings, prompt by prompt. Raises ValueError as `groups` does."""
        import torch

        made = []
        for own in groups(drawing):
            made += [self._optimized(drawing, own)] * (own.stop - own.start)
        drawing.embeddings = torch.cat(made)

    def _optimized(self, drawing: Drawing, own: slice):
        """Return the embedding [1, tokens, width] that the images of a prompt share."""
        import torch

        p = self.parameters
        latents = drawing.latents[own]
        embedding = drawing.embeddings[own][:1].detach().clone().requires_grad_(True)
        nothing = drawing.negative_embeddings[own][:1]
        timestep = drawing.timesteps[0]
        with torch.no_grad():
            unconditional = drawing.predict(latents, timestep, nothing.expand(len(latents), -1, -1)).float()
        optimizer = torch.optim.AdamW([embedding], lr=p.learning_rate, weight_decay=p.weight_decay)
        numbers = drawing.run.ledger.numbers
        loss = float("inf")
        for _ in range(p.iterations):
            shared = embedding.expand(len(latents), -1, -1)
            norm = (drawing.predict(latents, timestep, shared, with_gradient=True).float() - unconditional).norm()
            loss = float(norm.detach())
            if loss <= p.target:
                break
            slope = loss_scale.slope(norm, embedding, drawing.run.scales_loss)
            slope[:, 0] = 0
            start = embedding.detach()[:, :1].clone()
            embedding.grad = slope
            optimizer.step()
            with torch.no_grad():
                embedding[:, :1] = start  # weight decay too leaves the start as it is
        numbers["prompts_optimized"] = numbers.get("prompts_optimized", 0) + 1
        numbers["targets_missed"] = numbers.get("targets_missed", 0) + (loss > p.target)
        numbers.setdefault("target_an_image", p.target / len(latents) ** 0.5)
        return embedding.detach()


@register("defense")
class EmbeddingOptimization(DrawingMitigation):
    """Draw under embeddings whose first prediction hardly depends on the text."""

    name = "embedding_optimization"
    version = 1
    Parameters = Parameters
