"""Bilevel fine-tuning of a pruned student: distillation on general images while concepts are suppressed.

Shirkavand et al., CVPR 2025 (arXiv 2412.15341):

    min_theta L_up(theta)   subject to   theta in argmin_vartheta L_low(vartheta)

L_low is the loss of `harness/training/distillation.py`, L_up that of `harness/training/suppression.py`. The paper and
its released program solve this differently; a profile selects one, and sets the parameters that are None:

    released  One set of weights. After every 10 steps of AdamW on L_low, one step on L_up by another AdamW with other
              moments. Both rates are constant after a warm-up of 250 steps, counted in each level's own steps: an
              eighth of 2,000 upper steps run below their rate. No clipping, no weight decay. There is no penalty and no
              second student.
    paper     min_theta max_vartheta L_up(theta) + lambda (L_low(theta) - L_low(vartheta)), lambda = 100: K = 20 steps
              on L_low of a second student vartheta, which starts as theta, then one step on theta along the gradient of
              L_up + lambda L_low. Second-hand: the formula, K, lambda and the 20,000 steps over both loops are from a
              digest of the paper, whose text could not be read; no program and no result of this form is known. Rates,
              optimizer and warm-up are not in the digest: rates and AdamW are the program's, and there is no warm-up.

What vartheta is for: its term has no gradient in theta, so it changes no step of theta. It measures how much worse
theta is at the lower level than a student that only distils, L_low(theta) - L_low(vartheta), both on one batch before
each outer step; the last value is in the ledger as `fine_tuning_gap`. It costs 20 of 21 steps, and a second copy of
weights and moments.

Several concepts: batches are drawn from all their images together, in shuffled epochs (the released program's filter of
styles accepts several; only a configuration with one is released).

Differences from the paper: the L_up that the digest prints, |eps_theta(x_t, c') - eps(x_t, c)|^2 with an anchor c',
agrees neither with the digest's words nor with the program; the program's target serves in both profiles.
Differences from the released program: images are cropped at the centre (released: at random); one caption an image
(COCO has five, each in a row there); 20,000 lower steps, where its checkpoint of that name has 20,001; a model
that predicts noise is weighed by the standard min-SNR; the student is what the suite prunes or names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from defenses.pruning.students import (
    UPPER_PASSES,
    LowerLoss,
    Rate,
    Steps,
    Warmup,
    Weight,
    blocks_when_compiled,
    distillation,
    spread,
    suppression,
    unet_names,
)
from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.protection import Protection, ThreatModel
from harness.core.profiles import ByProfile
from harness.core.registry import register
from harness.core.sharding import global_batch

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run

_PROFILES: dict[str, dict[str, Any]] = {
    "released": {"lower_steps": 10, "warmup_steps": 250},
    "paper": {"lower_steps": 20, "warmup_steps": 0},
}


@dataclass(frozen=True, kw_only=True)
class Parameters(LowerLoss, ByProfile):
    """Defaults: those of the released configurations. None: set by the profile."""

    profile: Literal["released", "paper"] = "released"
    steps: Steps = 20_000
    """released: lower steps; paper: steps of both loops together. A rest that no upper step would follow is done in the
    profile released only: in the other it would change vartheta alone."""
    lower_steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Lower steps before each upper one; K in the paper."""
    lower_learning_rate: Rate = 1e-6
    """Of AdamW on the lower loss."""
    upper_learning_rate: Rate = 5e-6
    """Of AdamW on the upper loss (paper: of the outer step)."""
    warmup_steps: Warmup | None = None
    """The rate of each level grows linearly from 0 over so many steps of that level."""
    penalty: Annotated[float, Field(gt=0, le=1e6)] = 100.0
    """lambda of the profile paper."""
    strength: Weight = 1.0
    """eta of the upper loss: 0 maps the concept to the teacher's unconditional prediction."""

    def __post_init__(self) -> None:
        """Reject a lower loss without terms, and a run without any upper step."""
        super().__post_init__()
        if not self.upper_steps:
            least = self.chosen("lower_steps") + (self.profile == "paper")
            raise ValueError(f"steps must be at least {least}, or no upper step is taken (got {self.steps})")

    def of_profile(self) -> Mapping[str, Any]:
        """Return the profile's values."""
        return _PROFILES[self.profile]

    @property
    def upper_steps(self) -> int:
        """How many upper steps are taken."""
        return self.steps // (self.chosen("lower_steps") + (self.profile == "paper"))

    @property
    def iterations(self) -> int:
        """Steps of the training loop; each uses one batch of the lower loss."""
        return self.upper_steps * (self.chosen("lower_steps") + 1) if self.profile == "paper" else self.steps


_TESTBED: dict[str, Any] = {"batch_size": 8, "lower_learning_rate": 2e-4, "upper_learning_rate": 3e-4}


@register("defense")
class BilevelSuppress(Defense):
    """Distillation of a pruned student at a lower level, suppression of concepts at an upper one."""

    name = "bilevel_suppress"
    version = 1
    threat_model = ThreatModel(changes=("unet",))
    uses = frozenset({"targets", "images", "teacher", "pairs", "seed"})
    can_shard = True
    Parameters = Parameters
    quick = {
        "steps": 6, "lower_steps": 2, "batch_size": 2, "lower_learning_rate": 1e-3, "upper_learning_rate": 1e-3,
        "warmup_steps": 0,
    }  # fmt: skip
    presets = {
        # for the embedded testbed: docs/presets.md says how they were found
        "testbed": {**_TESTBED, "steps": 400, "warmup_steps": 5},
        "testbed_paper": {**_TESTBED, "profile": "paper", "steps": 420},
    }

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """Passes of both losses; with a second student one more forward pass at each upper step."""
        p = parameters
        gaps = p.upper_steps if p.profile == "paper" else 0
        return p.batch_size * (p.iterations * p.lower_passes + p.upper_steps * UPPER_PASSES + gaps)

    @classmethod
    def rehearsed(cls, parameters) -> tuple[Parameters, int]:
        """A lower step before each upper one, twice."""
        return replace(parameters, lower_steps=1, steps=8, warmup_steps=0), 4

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
        from harness.training.loop import train

        p = self.parameters
        made = (_Penalty if p.profile == "paper" else _Alternating)(p, model, targets, run)
        train(run, made, p.iterations, "bilevel fine-tuning")
        run.ledger.numbers |= {
            "general_samples": p.iterations * p.batch_size,
            "concept_samples": p.upper_steps * p.batch_size,
        }
        return Protection(tensors=made.released())


class _Alternating:
    """The profile released: both levels train the same weights in turn. A learner of the training loop."""

    def __init__(self, p: Parameters, model: DiffusionModel, targets: Sequence[ProtectedConcept], run: Run):
        from harness.training.weights import Level

        self.p, self.names = p, unet_names(model)
        self.every, self.warmup_steps = p.chosen("lower_steps"), p.chosen("warmup_steps")
        self.lower, self.upper = distillation(model, run, p), suppression(model, targets, run, p, p.strength)
        levels = {
            "lower": Level(self.names, p.lower_learning_rate),
            "upper": Level(self.names, p.upper_learning_rate),
        }
        self.weights = spread(model, run, levels)

    def step(self, index: int) -> dict[str, float | Tensor]:
        """Take a lower step, and after every so many an upper one."""
        from harness.training.suppression import mean_loss

        numbers = self.lower_step(index, index)
        if (index + 1) % self.every == 0:
            done = index // self.every
            parts = self.upper.at(done)
            self._take("upper", parts, done)
            numbers["upper_loss"] = mean_loss(parts)
        return numbers

    def lower_step(self, index: int, done: int) -> dict[str, Tensor]:
        """Take a step on the lower loss at batch `index`, after `done` of its level."""
        from harness.training.distillation import mean_terms

        parts = self.lower.at(index)
        self._take("lower", parts, done)
        return mean_terms(parts)

    def _take(self, level: str, parts: Sequence, done: int) -> None:
        """Step a level along the gradient of a loss, after `done` steps of it."""
        from harness.training.weights import warmed

        self.weights.step(level, self.weights.gradient(parts, self.names), warmed(done, self.warmup_steps))

    def released(self) -> dict[str, Tensor]:
        """Return the weights, whole."""
        return self.weights.whole(self.names)

    def state(self) -> dict[str, Tensor]:
        """Return weights and moments of both levels."""
        return self.weights.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.weights.load_state(state)


_WAITING = "theta/"


class _Penalty(_Alternating):
    """The profile paper: a second student is at the lower level, and theta steps on the penalized sum.

    The second student is installed, and its moments are those of the level "lower"; theta waits in a vector, and is
    installed for its own step, whose moments are those of the level "upper".
    """

    def __init__(self, p: Parameters, model: DiffusionModel, targets: Sequence[ProtectedConcept], run: Run):
        super().__init__(p, model, targets, run)
        self.theta = self.weights.read(self.names)

    def step(self, index: int) -> dict[str, float | Tensor]:
        """Take a step on the second student, or after every so many one on theta."""
        done, place = divmod(index, self.every + 1)
        return self.lower_step(index, done * self.every + place) if place < self.every else self._outer(index, done)

    def _outer(self, index: int, done: int) -> dict[str, float | Tensor]:
        from harness.training.distillation import mean_terms
        from harness.training.suppression import mean_loss

        lower, upper = self.lower.at(index, self.p.penalty), self.upper.at(done)
        self.weights.evaluate(lower)
        second = mean_terms(lower)["lower_loss"]
        self._exchange()
        try:
            self._take("upper", [*upper, *lower], done)
        finally:  # the loop skips a step whose gradient overflows in fp16
            self._exchange()
        own = mean_terms(lower)["lower_loss"]
        return {"upper_loss": mean_loss(upper), "outer_lower_loss": own, "fine_tuning_gap": own - second}

    def _exchange(self) -> None:
        """Install theta and let the second student wait, or the reverse; also in the optimizer's own copies."""
        installed = self.weights.read(self.names)
        self.weights.settle(self.theta)
        self.theta = installed

    def released(self) -> dict[str, Tensor]:
        """Return theta, whole."""
        self._exchange()
        return super().released()

    def state(self) -> dict[str, Tensor]:
        """Return weights of both students and moments of both levels."""
        waiting = {f"{_WAITING}{name}": value for name, value in self.weights.collected(self.theta).items()}
        return self.weights.state() | waiting

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned. Raises UnfitState, before anything is changed, if it does not fit."""
        from harness.model.saved_state import require

        require(state, {f"{_WAITING}{name}": shape for name, shape in self.weights.shapes(self.names).items()})
        self.weights.load_state(state)
        for name in self.names:
            self.theta |= self.weights.pieces({name: state[f"{_WAITING}{name}"]})
