"""A concept that is protected, attacked or kept, with its images by split and its prompts. Plain data, no torch.

The publisher immunizes with the split `defense`, the attacker trains on `attack`, and results are compared with
`reference`. The splits are disjoint. Within a task, no image that the publisher sees of one concept is in the attack
or reference split of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.core.words import Words

SPLITS = ("defense", "attack", "reference")
PRIOR = "prior"
"""The folder for images of a concept's class (not a split): the base model draws them from `class_prompts`."""
CLASS_PROMPTS = {"object": "object", "style": "artwork"}
"""Prompts for images of a class: MIMA's own words (papers' facts: mima.md, section 3)."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation prompt, and a description of what its image should show."""

    prompt: str  # may hold the attacker's identifier
    description: str  # the same in plain words: for text alignment


@dataclass(frozen=True)
class Concept:
    """A concept, resolved: plain data that a stage can carry."""

    name: str
    kind: str  # object | style
    phrase: str  # the words that name it, as an eraser uses them
    words: Words  # the attacker's name for it, in captions and evaluation prompts
    source: str  # catalog | folder | generated
    images: Mapping[str, tuple[str, ...]]  # split -> catalog ids or file names; () for generated
    captions: Mapping[str, tuple[str, ...]]  # defense, attack -> one caption per image
    descriptions: tuple[str, ...]  # plain words for each image of the attack split
    prompts: Mapping[str, tuple[str, ...]]  # split -> generating prompts; () unless generated
    evaluations: tuple[Evaluation, ...]
    probes: tuple[Evaluation, ...]  # an adaptive attacker judges its probes by them; none is an evaluation prompt
    class_prompts: tuple[str, ...]  # prompts for images of its class, for prior preservation
    digest: str  # of the images' content; "" when generated
    folder: str = ""  # where the files are on this machine; not part of any identity
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of a folder: split -> digest -> file name

    def count(self, split: str) -> int:
        """Return how many images the split holds."""
        return len(self.images[split]) or len(self.prompts[split])
