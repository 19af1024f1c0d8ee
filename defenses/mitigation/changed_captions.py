"""Captions changed in training: random tokens inserted, words repeated, or the caption replaced (Wen et al.; DCR).

Every visit of an example gets a fresh change. Wen et al. (ICLR 2024) insert one random token into every caption; DCR
(Somepalli et al., NeurIPS 2023) changes one caption in ten: two tokens inserted (`randwordadd`), two words repeated
(`wordrepeat`), or four random tokens in its place (`randrepl`). An honest trainer runs it; an adaptive one does not.

Facts: memorization.md 6, memorization_checked.md 14. Differences from the released code: as `changed_prompts`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from defenses.mitigation import texts
from defenses.mitigation.by_hooks import TrainingMitigation
from harness.contracts.hooks import AdaptationHook
from harness.core.registry import register
from harness.core.seeds import mix


@dataclass(frozen=True)
class Parameters:
    """Defaults: Wen et al.'s."""

    change: Literal["insert", "repeat", "replace"] = "insert"
    """insert: random tokens; repeat: words of the caption; replace: random tokens in its place."""
    count: Annotated[int, Field(ge=1, le=64)] = 1
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Chance that a caption is changed at a visit."""


@register("adaptation_hook")
class ChangedCaptions(AdaptationHook):
    """Rewrites captions."""

    name = "changed_captions"
    version = 1
    Parameters = Parameters

    def rewrite(self, captions, seeds, model):
        """Return each caption, changed with the stated chance."""
        p, tokenizer = self.parameters, model.tokenizer
        made = []
        for text, seed in zip(captions, seeds, strict=True):
            if random.Random(mix(seed, "whether")).random() >= p.probability:
                made.append(text)
            elif p.change == "insert":
                made.append(texts.with_tokens(text, p.count, tokenizer, seed))
            elif p.change == "repeat":
                made.append(texts.with_repeats(text, p.count, seed))
            else:
                made.append(texts.of_tokens(p.count, tokenizer, seed))
        return made


@register("defense")
class RandomTokenTraining(TrainingMitigation):
    """Have trainers change captions at random."""

    name = "random_token_training"
    version = 1
    hook = "changed_captions"
    Parameters = Parameters
    presets = {
        "wen": {"change": "insert", "count": 1, "probability": 1.0},
        "dcr_words": {"change": "insert", "count": 2, "probability": 0.1},
        "dcr_repeat": {"change": "repeat", "count": 2, "probability": 0.1},
        "dcr_replace": {"change": "replace", "count": 4, "probability": 0.1},
    }
