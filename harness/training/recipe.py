"""How attacks optimize, apart from their budget: shared parameters, and the recipe that training reads from them.

Without torch: modules of attacks are imported to check suites.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

LearningRate = Annotated[float, Field(gt=0, le=10)]
PriorWeight = Annotated[float, Field(ge=0, le=100)]
PriorImages = Annotated[int, Field(ge=1, le=10_000)]


@dataclass(frozen=True)
class Recipe:
    """How weights are trained, apart from the budget."""

    learning_rate: float
    weight_decay: float
    clip_norm: float | None  # of the gradient over all trained weights; None: not clipped
    flip: bool  # mirror half of the images at random
    prior_weight: float  # of the loss on class images
    momentum: float | None  # SGD with so much momentum in AdamW's place


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Parameters of every attack; each attack sets defaults for those without one."""

    learning_rate: LearningRate
    flip: bool
    """Mirror half of the images at random."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: with momentum 0.9, which an adaptive attacker may prefer."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2

    def recipe(self) -> Recipe:
        """Return how weights are trained: here without clipping and without class images."""
        momentum = {"adamw": None, "sgd": 0.9}[self.optimizer]
        return Recipe(self.learning_rate, self.weight_decay, None, self.flip, 0.0, momentum)


@dataclass(frozen=True, kw_only=True)
class WeightOptimization(Optimization):
    """Parameters of attacks that train weights or adapters: with clipping, and DreamBooth's prior preservation."""

    prior_weight: PriorWeight
    """Weight of the loss on class images (DreamBooth's prior preservation)."""
    prior_images: PriorImages
    """How many class images, where they are weighed."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0

    def recipe(self) -> Recipe:
        """Return how weights are trained."""
        return replace(super().recipe(), clip_norm=self.clip_norm, prior_weight=self.prior_weight)
