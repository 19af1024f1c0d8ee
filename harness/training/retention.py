"""Ascent under a bound on what must stay (`harness.training.retain`), over any `Weights`.

At each upper step k the batch k mod P of every kind of images is evaluated at the weights that would be released:

    r_k = R_k(theta_k) / R_k(theta_0)                                       ratio, of the same images, noise and times
    s_k = sum_j b^(k-j) R_j(theta_j) / sum_j b^(k-j) R_j(theta_0)           smoothed ratio, b = 1 - 1/window
    e_k = s_k - bound                                                       excess
    dual         m_k = max(0, m_{k-1} + rate * e_k),  m_{-1} = 0
                 g <- g + max(0, m_k + penalty * e_k) / R_0 * grad R_k      R_0: mean start loss of all P batches
    projection   where e_k > 0, and h = grad R_k:
                 g <- g - min(0, <g, h>) / |h|^2 * h + penalty * e_k * |g| / |h| * h

g is the gradient that the optimizer descends, so -grad U. Where <g, h> is negative, a step along -g raises R: that part
is taken out. |g| is its length before that.

Why the pairs: a batch's loss depends on its timesteps and noise far more than on a change of the weights, and both
factors of r_k share them, so the ratio of one batch varies little. A start loss from other batches would need hundreds
of them for the same precision. The start losses of P = min(rounds, 64) batches are computed once, before the first
step, so the original weights are not needed afterwards; later steps use these batches again. A ratio of sums is not
dominated by single batches with a small loss, as a mean of ratios would be.

"Would be released": weights that are trained but not released (an adapter, the whole UNet of DreamBooth, the weights
outside S^u of the released MIMA) are at their start during the evaluation. Their start is kept, and waits in main
memory with `vectors: cpu`. All numbers stay on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.model.saved_state import require
from harness.training.concept_loss import ConceptLoss
from harness.training.retain import REFERENCES, Retain
from harness.training.weights import Vector, Weights, add_scaled, installed

if TYPE_CHECKING:
    from harness.contracts.defense import ProtectedConcept
    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run
    from harness.training.diffusion import LossPart

NUMBERS = ("loss_ratio", "smoothed_ratio", "multiplier")
"""Numbers of a step, before the ratio of each kind. The multiplier is what grad R / R_0 was multiplied by."""


class Unbounded:
    """No bound: the gradient is used as it is."""

    def __init__(self, weights: Weights):
        self._weights = weights

    def bounded(self, slope: Vector, round_index: int) -> Vector:
        """Return the gradient."""
        return slope

    def numbers(self) -> dict[str, Tensor]:
        """Return nothing to log."""
        return {}

    def curves(self) -> tuple[dict[str, float], ...]:
        """Return nothing."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """Return the state of the weights."""
        return self._weights.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state of the weights."""
        self._weights.load_state(state)


class Bounded(Unbounded):
    """A bound, with its multiplier and its smoothed ratio; both are saved with the weights."""

    def __init__(
        self,
        chosen: Retain,
        run: Run,
        weights: Weights,
        losses: Mapping[str, ConceptLoss],
        names: Sequence[str],
        unreleased: Sequence[str],
        rounds: int,
    ):
        """Compute the start losses; the weights must be as before immunization.

        `losses`: by kind; `names`: the weights that ascend (S^u); `unreleased`: other weights that steps change for
        good; `rounds`: upper steps in all.
        """
        super().__init__(weights)
        self._chosen, self._run, self._losses = chosen, run, dict(losses)
        self._names = list(names)
        self._start = weights.aside(weights.read(unreleased))
        batches = min(rounds, REFERENCES)
        with run.ledger.phase("train"):
            found = []
            for place in range(batches):
                groups = self._groups(place)
                weights.evaluate([part for group in groups for part in group])
                found.append(self._means(groups))
        self._references = torch.stack(found)  # [batches, kinds]
        zero = torch.zeros((), dtype=torch.float64, device=run.device)
        self._sums = torch.stack([zero, zero])  # decayed sums of R(theta) and of R(theta_0)
        self._multiplier = zero.clone()
        shape = (rounds, len(NUMBERS) + len(self._losses))
        self._trajectory = torch.full(shape, torch.nan, dtype=torch.float64, device=run.device)
        self._last: Tensor | None = None

    def bounded(self, slope: Vector, round_index: int) -> Vector:
        """Return the gradient of an upper step with what keeps the bound; `slope` is changed in place.

        One more gradient is computed, which may overflow in fp16; nothing of the bound's state has changed then.
        """
        weights, chosen = self._weights, self._chosen
        place = round_index % len(self._references)
        groups = self._groups(place)
        with installed(weights, self._start):
            upward = weights.gradient([part for group in groups for part in group], self._names)
        now, start = self._means(groups), self._references[place]
        sums = (1 - 1 / chosen.window) * self._sums + torch.stack([now.mean(), start.mean()])
        smoothed = sums[0] / sums[1]
        excess, scale = smoothed - chosen.bound, self._references.mean()
        if chosen.by == "dual":
            multiplier = (self._multiplier + chosen.rate * excess).clamp(min=0)
            factor = (multiplier + chosen.penalty * excess).clamp(min=0) / scale
        else:
            multiplier = self._multiplier
            factor = self._projecting({name: slope[name] for name in self._names}, upward, excess)
        for name in self._names:
            add_scaled(slope[name], upward[name], factor)
        self._sums, self._multiplier = sums, multiplier
        self._last = torch.cat([torch.stack([now.mean() / start.mean(), smoothed, factor * scale]), now / start])
        self._trajectory[round_index] = self._last
        return slope

    def _projecting(self, slope: Vector, upward: Vector, excess: Tensor) -> Tensor:
        """Return the factor of the retention gradient that projects and descends; zero while the bound is kept."""
        length, along = self._weights.norm(upward), self._weights.dot(slope, upward)
        safe = torch.where(length > 0, length, 1.0)  # of a gradient of zeros nothing is added, whatever the factor
        projected = -along.clamp(max=0) / safe**2
        descending = self._chosen.penalty * excess * self._weights.norm(slope) / safe
        return torch.where(excess > 0, projected + descending, 0.0)

    def _groups(self, place: int) -> list[list[LossPart]]:
        """Return the parts of R on a batch, by kind."""
        return [loss.at(place, 1 / len(self._losses)) for loss in self._losses.values()]

    def _means(self, groups: Sequence[Sequence[LossPart]]) -> Tensor:
        """Return the mean loss of each kind at the last call, over all processes, [kinds]."""
        means = []
        for parts in groups:
            total = sum(torch.as_tensor(part.value).double() * len(part.batch) for part in parts)
            means.append(total / sum(len(part.batch) for part in parts))
        return self._run.world.averaged(torch.stack(means))

    def numbers(self) -> dict[str, Tensor]:
        """Return the smoothed ratio and the multiplier of the last step, to log."""
        if self._last is None:
            return {}
        return {"retention_ratio": self._last[1], "retention_multiplier": self._last[2]}

    def curves(self) -> tuple[dict[str, float], ...]:
        """Return a row for each round: `NUMBERS`, and the ratio of each kind. Skipped rounds have none."""
        names = (*NUMBERS, *(f"ratio_{kind}" for kind in self._losses))
        return tuple(
            {"round": index, **dict(zip(names, row, strict=True))}
            for index, row in enumerate(self._trajectory.tolist())
            if row[0] == row[0]  # not a number: the round was skipped
        )

    def state(self) -> dict[str, Tensor]:
        """Return the state of the weights and of the bound."""
        return self._weights.state() | {f"retain/{name}": value for name, value in self._own().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned. Raises UnfitState, before anything is changed, if it does not fit."""
        require(state, {f"retain/{name}": tuple(value.shape) for name, value in self._own().items()})
        self._weights.load_state(state)
        for name, value in self._own().items():
            value.copy_(state[f"retain/{name}"])

    def _own(self) -> dict[str, Tensor]:
        return {
            "references": self._references,
            "sums": self._sums,
            "multiplier": self._multiplier,
            "trajectory": self._trajectory,
        }


def bound(
    chosen: Retain | None,
    model: DiffusionModel,
    run: Run,
    weights: Weights,
    concepts: tuple[Sequence[ProtectedConcept], Sequence[ProtectedConcept]],
    names: Sequence[str],
    unreleased: Sequence[str],
    rounds: int,
) -> Unbounded:
    """Return what keeps a method's bound; None: it has none. Arguments are those of `Bounded`.

    `concepts`: targets and preserved ones. Called before the first step.
    """
    if chosen is None:
        return Unbounded(weights)
    losses = {}
    for kind in chosen.images:
        images, captions = _material(kind, chosen, run, *concepts)
        options: dict[str, Any] = {"batch_size": chosen.batch_size, "flip": False}
        losses[kind] = ConceptLoss(model, run, images, captions, seed=run.seed_for("retain", kind), **options)
    return Bounded(chosen, run, weights, losses, names, unreleased, rounds)


def _material(
    kind: str,
    chosen: Retain,
    run: Run,
    targets: Sequence[ProtectedConcept],
    preserved: Sequence[ProtectedConcept],
) -> tuple[list, list[str]]:
    """Return the images of a kind with their captions; targets of the same class have the same class images, once."""
    if kind == "general":
        general = run.general
        return [general.image(index) for index in range(len(general.captions))], list(general.captions)
    if kind == "preserved":
        return [i for each in preserved for i in each.images], [c for each in preserved for c in each.captions]
    # a method's own prior term may ask for more class images
    own = {(t.prior_files[: chosen.count], t.prior_captions[: chosen.count]): t for t in targets}
    images = [image for target in own.values() for image in target.prior_images[: chosen.count]]
    return images, [caption for _, captions in own for caption in captions]
