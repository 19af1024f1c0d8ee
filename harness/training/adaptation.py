"""What all attacks share: the denoising loss on the attacker's images, AdamW, and the trajectory that is read.

An attack defines which weights train and how they are saved. The rest is here, so that attacks differ in nothing else:
draws depend on (seed, step) alone, latents and text embeddings are encoded once, prior preservation adds the loss on
class images (DreamBooth), an honest attacker leaves frozen tensors alone and runs the publisher's training hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.model.pipeline import DiffusionModel
from harness.model.run import Run
from harness.training import sharding
from harness.training.concept_loss import ConceptLoss
from harness.training.diffusion import TextSource, are_rejected, encode_images, mean_value
from harness.training.loop import trajectory
from harness.training.recipe import Recipe
from harness.training.weights import Level, Weights

if TYPE_CHECKING:
    from harness.contracts.attack import AttackedConcept, Budget
    from harness.contracts.protection import Protection

LEVEL = "adaptation"


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

    Where the text encoder or a word is trained, `text` makes the embeddings of captions (or templates) at each step,
    `prior_text` those of the class captions. Raises ValueError when class images are weighed but missing.
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
    learner = _Adaptation(run, weights, loss, recipe.prior_weight, is_hooked=bool(hooks))
    for done in trajectory(run, learner, budget.steps, "the attack"):
        _note_bytes(run, weights)
        yield done, weights
    _note_bytes(run, weights)  # a run that is resumed at its end yields nothing


def _note_bytes(run: Run, weights: Weights) -> None:
    held = weights.bytes_held()
    run.ledger.numbers |= {"trained_bytes": held["weights"], "optimizer_bytes": held["optimizer"]}


class _Adaptation:
    """Descent of a concept's loss. A step is skipped when the publisher's hooks reject all of its examples."""

    def __init__(self, run: Run, weights: Weights, loss: ConceptLoss, prior_weight: float, *, is_hooked: bool):
        self._run, self._weights, self._loss = run, weights, loss
        self._prior_weight, self._is_hooked = prior_weight, is_hooked
        self._skipped = 0

    def step(self, index: int) -> dict[str, float]:
        """Step down the loss, or skip; return the loss of all examples, whatever their weight."""
        parts = self._loss.at(index, 1.0, self._prior_weight)
        slope = self._weights.gradient(parts, self._weights.levels[LEVEL].names)
        numbers = {"loss": mean_value(parts)}
        # with a gradient of zero AdamW would still move by its moments and decay the weights
        is_skipped = self._is_hooked and self._run.world.all(are_rejected(parts))
        if not is_skipped:
            self._weights.step(LEVEL, slope)
        if self._is_hooked:
            self._skipped += is_skipped
            numbers["skipped_steps"] = self._skipped
        return numbers

    def state(self) -> dict[str, Tensor]:
        """Return the weights' state, with the count of skipped steps where there are hooks."""
        counted = {"skipped_steps": torch.tensor(self._skipped)} if self._is_hooked else {}
        return self._weights.state() | counted

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        self._skipped = int(state.get("skipped_steps", 0))
        self._weights.load_state(state)
