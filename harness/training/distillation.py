"""The lower loss of pruned students: denoising and two distances from a frozen teacher, on general images.

Shirkavand et al., CVPR 2025 (arXiv 2412.15341), as released. With f the model's prediction, f_T the teacher's, x_t a
noised general image, c its caption and h_k, h_k^T the outputs of K blocks (`harness.training.block_outputs`):

    L = a mean_b[ w(t_b) mean|f(x_t, c) - target|^2 ] + b mean|f(x_t, c) - f_T(x_t, c)|^2
        + (g / K) sum_k mean|h_k - h_k^T|^2

with a = 1, b = 2, g = 0.1. K is 9 on Stable Diffusion; a block that the student lacks is left out of the mean.

The weight of a timestep (min-SNR, Hang et al. 2023, with limit 5) is min(s, 5) / s, where s is the factor by which the
loss weighs the error of x_0 at t: for a model that predicts velocity s = SNR + 1, as in the released program, and for
one that predicts noise s = SNR, the standard form. (v = sqrt(abar) eps - sqrt(1 - abar) x_0 at a given x_t makes an
error of v that of x_0 divided by sqrt(1 - abar), so s = 1 / (1 - abar) = SNR + 1; the error of eps is that of x_0 times
sqrt(SNR).) Both keep weight 1 at noisy steps, and limit the factor of the others to 5. The standard form for velocity
is min(SNR, 5) / (SNR + 1), which gives noisy steps less weight.

A teacher and its student read the same text embeddings, since pruning changes the UNet only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from harness.model.pipeline import DiffusionModel
from harness.model.run import Pairs, Run
from harness.training.block_outputs import matches, watched
from harness.training.diffusion import Draw, denoising_losses, micro_batches
from harness.training.general_pairs import GeneralPairs
from harness.training.teacher import predicted, require_same_prediction

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Terms:
    """The weights of the three terms, and the limit of the timesteps' weight."""

    denoising: float = 1.0
    output: float = 2.0
    blocks: float = 0.1
    snr_limit: float = 5.0

    @property
    def need_teacher(self) -> bool:
        """Whether any term is a distance from the teacher."""
        return bool(self.output or self.blocks)


def timestep_weights(scheduler, timesteps: Tensor, limit: float) -> Tensor:
    """Return the weight of the denoising loss at timesteps, [timesteps], fp32; see the module docstring."""
    abar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    factor = abar / (1 - abar)
    if scheduler.config.prediction_type == "v_prediction":
        factor = factor + 1
    return (limit / factor).clamp(max=1.0)


@dataclass(frozen=True)
class _Answer:
    """What the teacher predicts for a batch; no graph."""

    prediction: Tensor
    blocks: Sequence[Tensor]  # one per match, at the channels that the student kept


@dataclass
class DistillationPart:
    """The loss on one micro-batch; calling it evaluates the loss at the installed weights."""

    loss: Distillation
    batch: Draw
    answer: _Answer | None
    weight: float  # factor of the sum of its examples' losses
    values: dict[str, Tensor] = field(default_factory=dict)  # mean of each term over its examples, at the last call

    def __call__(self) -> Tensor:
        """Return the weighted loss, with its graph."""
        examples = self.loss.terms_of(self.batch, self.answer)
        self.values = {name: term.detach().mean().double() for name, term in examples.items()}
        return self.weight * sum(examples.values()).sum()


class Distillation:
    """The lower loss on batches of general pairs. Make it before weights are spread: it reads both models' blocks."""

    def __init__(
        self,
        model: DiffusionModel,
        teacher: DiffusionModel | None,
        run: Run,
        pairs: Pairs,
        *,
        batch_size: int,
        terms: Terms,
        flip: bool,
        seed: int,
    ):
        """`teacher` is needed unless only the denoising term has a weight; it is used as it is, without gradients.

        Raises ValueError if there are no pairs, if the models' blocks cannot be compared, or if they predict different
        things.
        """
        self._model, self._run, self._teacher, self._terms = model, run, teacher, terms
        self._scheduler = model.noise_scheduler()
        self._pairs = GeneralPairs(model, run, pairs, batch_size=batch_size, flip=flip, seed=seed)
        self._matches, left_out = [], []
        if terms.need_teacher:
            require_same_prediction(model, teacher)
        if terms.blocks:
            self._matches, left_out = matches(model.unet, teacher.unet)
        if left_out and run.world.rank == 0:
            run.notify(f"the student has no block like the teacher's {', '.join(left_out)}: not compared")

    def at(self, step: int, weight: float = 1.0) -> list[DistillationPart]:
        """Return the parts of this process; over all processes their mean is `weight` times the loss of a step's batch.

        The teacher's predictions for all of them are computed here, so they are counted without a backward pass.
        """
        own = self._pairs.batch(step)
        return [
            DistillationPart(self, batch, self._answer(batch) if self._terms.need_teacher else None, weight / len(own))
            for batch in micro_batches(own, self._run)
        ]

    def terms_of(self, batch: Draw, answer: _Answer | None) -> dict[str, Tensor]:
        """Return term -> weighted loss of each example [batch], with a graph."""
        terms = self._terms
        with watched(self._model.unet, [match.student for match in self._matches]) as outputs:
            losses, _, prediction = denoising_losses(self._model, self._run, self._scheduler, batch)
        weights = timestep_weights(self._scheduler, batch.timesteps, terms.snr_limit)
        found = {"denoising": terms.denoising * weights * losses}
        if terms.output:
            found["output"] = terms.output * _distances(prediction, answer.prediction)
        if terms.blocks:
            own = [outputs[match.student] for match in self._matches]
            apart = [_distances(mine, theirs) for mine, theirs in zip(own, answer.blocks, strict=True)]
            found["blocks"] = terms.blocks * sum(apart) / len(apart)
        return found

    def _answer(self, batch: Draw) -> _Answer:
        """Return the teacher's predictions for the noised images of a batch."""
        noisy = self._scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        with watched(self._teacher.unet, [match.teacher for match in self._matches]) as outputs:
            prediction = predicted(self._teacher, self._run, noisy, batch.timesteps, batch.embeddings)
        return _Answer(prediction, [match.of_teacher(outputs[match.teacher]) for match in self._matches])


def mean_terms(parts: Sequence[DistillationPart]) -> dict[str, Tensor]:
    """Return the mean of each term over the parts at their last call, and of their sum ("lower_loss"), fp64."""
    count = sum(len(part.batch) for part in parts)
    terms = {name: sum(part.values[name] * len(part.batch) for part in parts) / count for name in parts[0].values}
    return {"lower_loss": sum(terms.values())} | {f"lower_{name}": value for name, value in terms.items()}


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared distance of each example, [batch]."""
    return (one.float() - other.float()).square().flatten(1).mean(1)
