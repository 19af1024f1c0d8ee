"""What the recipes of pruned students share: parameters of their losses, and the training of the whole UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

if TYPE_CHECKING:
    from harness.contracts.defense import ProtectedConcept
    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run
    from harness.training.distillation import Distillation
    from harness.training.suppression import Suppression
    from harness.training.weights import Level, Weights

Steps = Annotated[int, Field(ge=1, le=10_000_000)]
Rate = Annotated[float, Field(gt=0, le=10)]
Warmup = Annotated[int, Field(ge=0, le=1_000_000)]
Weight = Annotated[float, Field(ge=0, le=1000)]

FORWARD_AND_BACKWARD = 3.0
"""Passes of an example: a backward pass counts 2."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Parameters of every recipe. Defaults: those of the released configurations."""

    batch_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Images of each step, of either loss; global: over all processes. Released: 16 on each of four GPUs."""
    flip: bool = True
    """Mirror half of the images at random."""


@dataclass(frozen=True, kw_only=True)
class LowerLoss(Batches):
    """Parameters of the lower loss, `harness.training.distillation`. Defaults: those of the released configurations."""

    denoising_weight: Weight = 1.0
    """Of the denoising loss."""
    output_weight: Weight = 2.0
    """Of the distance between the predictions of student and teacher."""
    block_weight: Weight = 0.1
    """Of the mean distance between the outputs of their blocks. It must be 0 for a student with other widths that is
    not a pruned copy of the teacher."""
    snr_limit: Annotated[float, Field(gt=0, le=1e6)] = 5.0
    """Limit of min-SNR."""

    def __post_init__(self) -> None:
        """Reject a loss without any term."""
        if not (self.denoising_weight or self.output_weight or self.block_weight):
            raise ValueError("denoising_weight, output_weight and block_weight are all 0: there is nothing to train on")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the lower loss compares with the teacher."""
        return bool(self.output_weight or self.block_weight)

    @property
    def lower_passes(self) -> float:
        """Passes of an example of the lower loss: the student's, and the teacher's."""
        return FORWARD_AND_BACKWARD + self.needs_teacher


def blocks_when_compiled(p: LowerLoss) -> list[tuple[str, str]]:
    """Return (parameter, message) if the lower loss compares blocks, which compiled code does not show."""
    if not p.block_weight:
        return []
    what = "hooks read the outputs of the UNet's blocks, and code of torch.compile calls none; set block_weight to 0"
    return [("block_weight", f"{what}, or resources.compile: false")]


UPPER_PASSES = FORWARD_AND_BACKWARD + 2
"""Passes of an example of the upper loss: the student's, and the teacher's without and with the caption."""


def distillation(model: DiffusionModel, run: Run, p: LowerLoss) -> Distillation:
    """Return the lower loss; make it before the weights are spread."""
    from harness.training.distillation import Distillation, Terms

    terms = Terms(p.denoising_weight, p.output_weight, p.block_weight, p.snr_limit)
    seed = run.seed_for("lower")
    return Distillation(
        model, run.teacher, run, run.pairs, batch_size=p.batch_size, terms=terms, flip=p.flip, seed=seed
    )


def suppression(
    model: DiffusionModel, targets: Sequence[ProtectedConcept], run: Run, p: Batches, strength: float
) -> Suppression:
    """Return the upper loss on the images of all targets together."""
    from harness.training.suppression import Suppression

    return Suppression(
        model,
        run.teacher,
        run,
        [image for target in targets for image in target.images],
        [caption for target in targets for caption in target.captions],
        batch_size=p.batch_size,
        strength=strength,
        flip=p.flip,
        seed=run.seed_for("upper"),
    )


def unet_names(model: DiffusionModel) -> tuple[str, ...]:
    """Return the names of the UNet's parameters: all are trained."""
    from harness.training.selection import select

    return tuple(select(model.parameters(), "unet"))


def spread(model: DiffusionModel, run: Run, levels: Mapping[str, Level]) -> Weights:
    """Return the UNet's weights, spread as the run says like the teacher's; note how many are trained."""
    from harness.training import sharding

    trained = model.change(unet_names(model))
    run.ledger.numbers["trainable_parameters"] = sum(p.numel() for p in trained.values())  # before ZeRO 3 splits them
    if run.teacher is not None:
        sharding.partition_frozen(run.teacher, run)
    return sharding.spread(model, trained, levels, run)
