"""Suppression of concepts in a fine-tuned student by the upper loss alone: the second stage of a two-stage control.

The upper level of Shirkavand et al., CVPR 2025 (arXiv 2412.15341), as released, on its own and after distillation. The
loss is described in `harness/training/suppression.py`: at noised images of the concept, its captions are trained to
predict the unpruned teacher's negation of the concept. All parameters of the UNet are trained, with the optimizer,
rate and warm-up of the upper level, for the number of upper steps that the bilevel run takes (2,000 in 20,000): the
two-stage control that sees as many samples and trains as many parameters as the bilevel run. The paper's own controls
are not of this kind: ESD sees 1,000 single samples there and trains cross-attention only.

Differences from the paper: it has no such row. Differences from the released program: as in `bilevel.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from defenses.pruning.students import (
    UPPER_PASSES,
    Batches,
    Rate,
    Steps,
    Warmup,
    Weight,
    spread,
    suppression,
    unet_names,
)
from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register
from harness.core.sharding import global_batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Parameters(Batches):
    """Defaults: those of the released upper level."""

    steps: Steps = 2000
    """As many as the upper steps in 20,000 lower ones."""
    learning_rate: Rate = 5e-6
    """Of AdamW."""
    warmup_steps: Warmup = 250
    """The rate grows linearly from 0 over so many steps."""
    strength: Weight = 1.0
    """eta: 0 maps the concept to the teacher's unconditional prediction."""


@register("defense")
class Suppress(Defense):
    """Suppression of concepts by the negation of the teacher's prediction, on all parameters of the UNet."""

    name = "suppress"
    version = 1
    threat_model = ThreatModel(changes=("unet",))
    uses = frozenset({"targets", "images", "teacher", "seed"})
    can_erase = True
    interprets_predictions = False
    can_shard = True
    Parameters = Parameters
    quick = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0}
    presets = {
        # for the embedded testbed: docs/presets.md says how it was found
        "testbed": {"steps": 40, "batch_size": 8, "learning_rate": 1e-4, "warmup_steps": 5},
    }

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """A forward and a backward pass of the student, and two of the teacher, for each example."""
        return parameters.steps * parameters.batch_size * UPPER_PASSES

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Reject a batch that the processes do not divide."""
        return list(global_batch(parameters, sharding))

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the fine-tuned UNet's weights."""
        from harness.training.loop import StepOver, train
        from harness.training.suppression import mean_loss
        from harness.training.weights import Level, warmed

        p, names = self.parameters, unet_names(model)
        loss = suppression(model, targets, run, p, p.strength)
        weights = spread(model, run, {"upper": Level(names, p.learning_rate)})

        def step(index: int) -> dict[str, float | Tensor]:
            parts = loss.at(index)
            weights.step("upper", weights.gradient(parts, names), warmed(index, p.warmup_steps))
            return {"upper_loss": mean_loss(parts)}

        train(run, StepOver(step, weights), p.steps, "suppression")
        run.ledger.numbers |= {"general_samples": 0, "concept_samples": p.steps * p.batch_size}
        return Protection(tensors=weights.whole(names))
