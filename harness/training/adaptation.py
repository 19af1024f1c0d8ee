"""Code shared by all attacks: the denoising loss on the attacker's images, AdamW, and the saved trajectory.

An attack defines only which weights are trained and how they are saved. Everything else is the same for all attacks:
random draws depend only on (seed, step), latents and text embeddings are encoded once, prior preservation adds the loss
on class images (DreamBooth), an honest attacker does not train frozen tensors and runs the publisher's training hooks.
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
from harness.training.diffusion import TextSource, encode_images, mean_value
from harness.training.loop import trajectory
from harness.training.recipe import Recipe
from harness.training.weights import Level, Weights

if TYPE_CHECKING:
    from harness.contracts.attack import AttackedConcept, Budget
    from harness.contracts.protection import Protection

LEVEL = "adaptation"


def trainable(names: Iterable[str], protection: Protection, budget: Budget) -> list[str]:
    """Return the names that this attacker may train; an honest attacker does not train frozen tensors.

    Raises ValueError if no name is left.
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

    If weights that text embeddings depend on are trained, `text` computes the embeddings of captions (or templates) at
    each step, and `prior_text` those of class captions. Raises ValueError for a prior weight without class images.
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
    run.ledger.numbers["trainable_parameters"] = sum(p.numel() for p in trained.values())  # before ZeRO 3 splits them
    weights = sharding.spread(model, trained, {LEVEL: level}, run)
    learner = _Adaptation(run, weights, loss, recipe.prior_weight)
    for done in trajectory(run, learner, budget.steps, "the attack"):
        _note_bytes(run, weights)
        yield done, weights
    _note_bytes(run, weights)  # also here: a run resumed at its last step yields nothing


def _note_bytes(run: Run, weights: Weights) -> None:
    held = weights.bytes_held()
    run.ledger.numbers |= {"trained_bytes": held["weights"], "optimizer_bytes": held["optimizer"]}


class _Adaptation:
    """Minimization of a concept's loss. If the publisher's hooks reject every example of a step, it is skipped."""

    def __init__(self, run: Run, weights: Weights, loss: ConceptLoss, prior_weight: float):
        self._run, self._weights, self._loss = run, weights, loss
        self._prior_weight = prior_weight
        self._skipped = 0

    def step(self, index: int) -> dict[str, float | Tensor]:
        """Take or skip one optimizer step; return the mean loss over all examples, unweighted."""
        groups = self._loss.groups(index, 1.0, self._prior_weight)
        is_skipped = self._loss.hooks.step(self._weights, LEVEL, groups)
        numbers = {"loss": mean_value([part for group in groups for part in group])}
        if self._loss.hooks:
            self._skipped += is_skipped
            numbers["skipped_steps"] = self._skipped
        return numbers

    def state(self) -> dict[str, Tensor]:
        """Return the weights' state and, if there are hooks, the number of skipped steps."""
        counted = {"skipped_steps": torch.tensor(self._skipped)} if self._loss.hooks else {}
        return self._weights.state() | counted

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self._weights.load_state(state)
        self._skipped = int(state.get("skipped_steps", 0))
