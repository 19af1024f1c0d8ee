"""Distillation of a pruned student: fine-tuning towards its teacher on general images, without any suppression.

The lower level of Shirkavand et al., CVPR 2025 (arXiv 2412.15341), on its own: the first stage of their two-stage
baselines, and what every recipe is compared with. The loss is described in `harness/training/distillation.py`: min-SNR
denoising, the distance from the teacher's prediction, and that of the outputs of the blocks. All parameters of the UNet
are trained by AdamW (betas 0.9 and 0.999, eps 1e-8, no weight decay) at a constant rate after a warm-up; gradients are
not clipped; captions are never dropped.

Released configurations: 512 pixels, 20,000 steps of 64 (the checkpoint that is used everywhere), rate 1e-6. Those with
one loss only are `output_weight: 0, block_weight: 0` and `denoising_weight: 0`.

Differences from the released program: images are cropped at the centre (released: at random); one caption an image
(COCO has five, each in a row there); the student is not its APTP expert but what the suite prunes or names, and
blocks that the student lacks, or whose widths differ, are handled as `harness/training/block_outputs.py` says; a model
that predicts noise is weighed by the standard min-SNR. How the paper differs from its program: see `bilevel.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from defenses.pruning.students import (
    LowerLoss,
    Rate,
    Steps,
    Warmup,
    blocks_when_compiled,
    distillation,
    spread,
    unet_names,
)
from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register
from harness.core.sharding import global_batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Parameters(LowerLoss):
    """Defaults: those of the released configurations."""

    steps: Steps = 20_000
    learning_rate: Rate = 1e-6
    """Of AdamW."""
    warmup_steps: Warmup = 250
    """The rate grows linearly from 0 over so many steps."""


@register("defense")
class Distill(Defense):
    """Distillation of a pruned student from its teacher, on general images with captions."""

    name = "distill"
    version = 1
    threat_model = ThreatModel(changes=("unet",))
    uses = frozenset({"teacher", "pairs", "seed"})
    can_shard = True
    Parameters = Parameters
    quick = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0}
    presets = {
        # for the embedded testbed: docs/presets.md says how it was found
        "testbed": {"steps": 400, "batch_size": 8, "learning_rate": 2e-4, "warmup_steps": 5},
    }

    @classmethod
    def used(cls, parameters) -> frozenset[str]:
        """Without the teacher where no term compares with it."""
        return cls.uses if parameters.needs_teacher else cls.uses - {"teacher"}

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """A forward and a backward pass of the student, and one of the teacher, for each example."""
        return parameters.steps * parameters.batch_size * parameters.lower_passes

    @classmethod
    def check_compiled(cls, parameters) -> list[tuple[str, str]]:
        """Reject the comparison of blocks, whose outputs hooks read."""
        return blocks_when_compiled(parameters)

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Reject a batch that the processes do not divide."""
        return list(global_batch(parameters, sharding))

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the fine-tuned UNet's weights."""
        from harness.training.distillation import mean_terms
        from harness.training.loop import StepOver, train
        from harness.training.weights import Level, warmed

        p, names = self.parameters, unet_names(model)
        loss = distillation(model, run, p)
        weights = spread(model, run, {"lower": Level(names, p.learning_rate)})

        def step(index: int) -> dict[str, Tensor]:
            parts = loss.at(index)
            weights.step("lower", weights.gradient(parts, names), warmed(index, p.warmup_steps))
            return mean_terms(parts)

        train(run, StepOver(step, weights), p.steps, "distillation")
        run.ledger.numbers |= {"general_samples": p.steps * p.batch_size, "concept_samples": 0}
        return Protection(tensors=weights.whole(names))
