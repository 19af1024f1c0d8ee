"""How attacks optimize, apart from their budget: their shared parameters, and the training settings made from them.

Without torch, since checking a suite imports the attacks' modules.
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
    clip_norm: float | None  # limit of the gradient norm over all trained weights; None: no clipping
    flip: bool  # mirror half of the images at random
    prior_weight: float  # of the loss on class images
    momentum: float | None  # of SGD, used instead of AdamW; None: AdamW


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Parameters of every attack; each attack defines its own default where there is none here."""

    learning_rate: LearningRate
    flip: bool
    """Mirror half of the images at random."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: with momentum 0.9; an adaptive attacker may prefer it."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2

    def recipe(self) -> Recipe:
        """Return how weights are trained: without clipping and class images."""
        momentum = {"adamw": None, "sgd": 0.9}[self.optimizer]
        return Recipe(self.learning_rate, self.weight_decay, None, self.flip, 0.0, momentum)


@dataclass(frozen=True, kw_only=True)
class WeightOptimization(Optimization):
    """Parameters of attacks that train weights or adapters: with clipping, and DreamBooth's prior preservation."""

    prior_weight: PriorWeight
    """Weight of the loss on class images (DreamBooth's prior preservation)."""
    prior_images: PriorImages
    """Number of class images, used if `prior_weight` is above zero."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Limit of the gradient's norm over all trained weights; None: no clipping."""

    def recipe(self) -> Recipe:
        """Return how weights are trained."""
        return replace(super().recipe(), clip_norm=self.clip_norm, prior_weight=self.prior_weight)
