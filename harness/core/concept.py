"""A concept: what is protected, attacked or kept, with its images by split and its prompts. Plain data, no torch.

Splits: `defense` is what the publisher immunizes with, `attack` what the attacker trains on, `reference` what results
are compared with. They are disjoint, and what the publisher sees of one concept is not among what another concept of
the same task is attacked with or compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.core.words import Words

SPLITS = ("defense", "attack", "reference")
PRIOR = "prior"
"""The folder of the images of a concept's class, which is no split: the base model draws them from `class_prompts`."""
CLASS_PROMPTS = {"object": "object", "style": "artwork"}
"""What images of a class are drawn from: MIMA's own words (papers' facts: mima.md, section 3)."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation prompt: the prompt for the attacked model, and a description of the expected image."""

    prompt: str  # may hold the attacker's identifier
    description: str  # the same in plain words: for text alignment


@dataclass(frozen=True)
class Concept:
    """A concept, resolved: plain data that a stage can carry."""

    name: str
    kind: str  # object | style
    phrase: str  # the words that name it: what an eraser erases
    words: Words  # the attacker's name for it, in captions and evaluation prompts
    source: str  # catalog | folder | generated
    images: Mapping[str, tuple[str, ...]]  # split -> catalog ids or file names; () for generated
    captions: Mapping[str, tuple[str, ...]]  # defense, attack -> one caption an image
    descriptions: tuple[str, ...]  # plain words for each image of the attack split
    prompts: Mapping[str, tuple[str, ...]]  # split -> generating prompts; () unless generated
    evaluations: tuple[Evaluation, ...]
    probes: tuple[Evaluation, ...]  # prompts by which an adaptive attacker judges its probes; no evaluation prompts
    class_prompts: tuple[str, ...]  # what images of its class are drawn from, for prior preservation
    digest: str  # of the images' content; "" when generated
    folder: str = ""  # where the files are on this machine; not part of any identity
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of a folder: split -> digest -> file name

    def count(self, split: str) -> int:
        """Return how many images the split holds."""
        return len(self.images[split]) or len(self.prompts[split])
