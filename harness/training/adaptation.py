"""What all attacks share: the denoising loss on the attacker's images, AdamW, and the trajectory that is read.

An attack says which weights train and how they are saved. The rest is here, so that attacks differ in nothing else:
draws depend on (seed, step) alone, latents and text embeddings are encoded once, prior preservation adds the loss on
class images (DreamBooth), an honest attacker leaves frozen tensors alone and runs the publisher's training hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from harness.model.pipeline import DiffusionModel
from harness.model.run import Run
from harness.training import sharding
from harness.training.concept_loss import ConceptLoss
from harness.training.diffusion import TextSource, encode_images, mean_value
from harness.training.loop import trajectory
from harness.training.weights import Level, Weights

if TYPE_CHECKING:
    from harness.contracts.attack import AttackedConcept, Budget
    from harness.contracts.protection import Protection

LEVEL = "adaptation"


@dataclass(frozen=True)
class Recipe:
    """How weights are trained, beside the budget."""

    learning_rate: float
    weight_decay: float
    clip_norm: float | None
    flip: bool
    prior_weight: float
    momentum: float | None  # SGD with so much momentum in AdamW's place

    @classmethod
    def of(cls, parameters: Any) -> Recipe:
        """Return what an attack's parameters say; what it has no parameter for is not done."""
        return cls(
            parameters.learning_rate,
            parameters.weight_decay,
            getattr(parameters, "clip_norm", None),
            parameters.flip,
            getattr(parameters, "prior_weight", 0.0),
            {"adamw": None, "sgd": 0.9}[parameters.optimizer],
        )


def trainable(names: Iterable[str], protection: Protection, budget: Budget) -> list[str]:
    """Return the names that this attacker may train: an honest one leaves frozen tensors alone.

    Raises ValueError when nothing is left.
    """
    frozen = protection.frozen if budget.is_honest else frozenset()
    left = [name for name in names if name not in frozen]
    if not left:
        raise ValueError("no weight is left to adapt: the publisher froze them all")
    return left


def adapt(
    model: DiffusionModel,
    concept: AttackedConcept,
    protection: Protection,
    budget: Budget,
    run: Run,
    trained: Mapping[str, nn.Parameter],
    recipe: Recipe,
    *,
    text: TextSource | None = None,
    prior_text: TextSource | None = None,
    templates: Sequence[str] = (),
) -> Iterator[tuple[int, Weights]]:
    """Train `trained` on the concept; yield (step, weights) at each step of the budget.

    `text` makes the embeddings of captions (or templates) at each step, `prior_text` those of the class captions, where
    what they depend on is trained. Raises ValueError when class images are weighed that there are not.
    """
    from harness.contracts.hooks import make_hooks

    hooks = make_hooks("adaptation_hook", protection.adaptation) if budget.is_honest else []
    prior = None
    if recipe.prior_weight:
        if not concept.prior_files:
            raise ValueError("prior preservation is weighed, but there are no class images")
        prior = encode_images(
            model, run, concept.prior_images, concept.prior_captions, flip=recipe.flip, text=prior_text
        )
    loss = ConceptLoss(
        model,
        run,
        concept.images,
        concept.captions,
        batch_size=budget.batch_size,
        flip=recipe.flip,
        seed=run.seed_for("noise"),
        prior=prior,
        text=text,
        templates=templates,
        hooks=hooks,
    )
    level = Level(tuple(trained), recipe.learning_rate, recipe.weight_decay, recipe.clip_norm, recipe.momentum)
    run.ledger.numbers["trainable_parameters"] = sum(p.numel() for p in trained.values())  # ZeRO 3 leaves pieces
    weights = sharding.spread(model, trained, {LEVEL: level}, run)

    def step(index: int) -> dict[str, float]:
        parts = loss.at(index, 1.0, recipe.prior_weight)
        weights.step(LEVEL, weights.gradient(parts, level.names))
        return {"loss": mean_value(parts)}

    for done in trajectory(run, weights, budget.steps, step, "the attack"):
        held = weights.bytes_held()
        run.ledger.numbers |= {"trained_bytes": held["weights"], "optimizer_bytes": held["optimizer"]}
        yield done, weights
