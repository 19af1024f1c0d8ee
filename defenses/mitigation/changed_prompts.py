"""Prompts changed before drawing: random tokens (RTA), random numbers (RNA), repeated words (CWR).

Baselines of Wen et al. (ICLR 2024), after DCR (Somepalli et al., NeurIPS 2023): `count` insertions into every prompt
(`defenses.mitigation.texts`); Wen et al. use 4, SAIL sweeps 1, 2, 4, 6 and 8. With `probability` below 1 a prompt is
left as it is otherwise, as in DCR's training.

All images of a prompt share one changed text, as in Wen's code; it depends on the seeds of the starting noise.

Differences from the released code: token ids are drawn from the whole vocabulary without special tokens (there from 0
to 49,399 of 49,408); its position and its token come from two generators, here from one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from defenses.mitigation import texts
from defenses.mitigation.by_hooks import DrawingMitigation
from defenses.mitigation.by_prompt import groups
from harness.contracts.hooks import SamplingHook
from harness.core.registry import register
from harness.core.seeds import mix

if TYPE_CHECKING:
    from harness.model.drawing import Drawing


@dataclass(frozen=True)
class Parameters:
    """Default: Wen et al.'s number of insertions."""

    count: Annotated[int, Field(ge=1, le=64)] = 4
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Chance that a prompt is changed at all."""


class ChangedPrompts(SamplingHook):
    """Encodes changed texts in place of the prompts."""

    Parameters = Parameters

    def changed(self, text: str, drawing: Drawing, seed: int) -> str:
        """Return the changed text."""
        raise NotImplementedError

    def begin(self, drawing: Drawing) -> None:
        """Replace the embeddings; the images of a prompt share a text. Raises ValueError as `groups` does."""
        import torch

        shown = []
        for own in groups(drawing):
            prompt, seed = drawing.prompts[own.start], mix(drawing.seeds[own.start], "changed prompt")
            is_changed = random.Random(mix(seed, "whether")).random() < self.parameters.probability
            shown += [self.changed(prompt, drawing, seed) if is_changed else prompt] * (own.stop - own.start)
        once = dict.fromkeys(shown)
        known = dict(zip(once, drawing.model.encode_text(list(once)), strict=True))
        drawing.embeddings = torch.stack([known[text] for text in shown])


@register("sampling_hook")
class WithTokens(ChangedPrompts):
    """Inserts random tokens."""

    name = "random_tokens"
    version = 1

    def changed(self, text, drawing, seed):
        """Insert tokens of the model's tokenizer."""
        return texts.with_tokens(text, self.parameters.count, drawing.model.tokenizer, seed)


@register("sampling_hook")
class WithNumbers(ChangedPrompts):
    """Inserts random numbers."""

    name = "random_numbers"
    version = 1

    def changed(self, text, drawing, seed):
        """Insert numbers."""
        return texts.with_numbers(text, self.parameters.count, seed)


@register("sampling_hook")
class WithRepeats(ChangedPrompts):
    """Repeats words."""

    name = "repeated_words"
    version = 1

    def changed(self, text, drawing, seed):
        """Repeat words of the prompt."""
        return texts.with_repeats(text, self.parameters.count, seed)


class _Changing(DrawingMitigation):
    """Changes every prompt."""

    Parameters = Parameters
    presets = {"wen": {"count": 4}}  # and DCR's sd_mitigation.py


@register("defense")
class RandomTokens(_Changing):
    """Insert random tokens into every prompt (RTA)."""

    name = "random_tokens"
    version = 1


@register("defense")
class RandomNumbers(_Changing):
    """Insert random numbers into every prompt (RNA)."""

    name = "random_numbers"
    version = 1


@register("defense")
class RepeatedWords(_Changing):
    """Repeat words of every prompt (CWR)."""

    name = "repeated_words"
    version = 1
