"""CLAMP-like, second-hand: the four terms of CLAMP as a digest of the paper has them. It is not the authors' method.

CLAMP (Sarker et al., CVPR 2026) has no released code, and its text could not be read. What follows implements formulas
of a third party's digest; the digest names no hyper-parameter, so every default here is ours. Do not report results of
this file as CLAMP's.

An attacker is simulated by K steps T(w) = w - alpha grad L_H(w) from the released weights w_0, with L_H the denoising
loss of the protected concepts. u_t is the update at t, g_K the gradient at w_K, v a random unit vector:

    gain so far          D = L_H(w_0) - L_H(w_K)
    contraction          c = | T(w_K + eps v) - T(w_K) | / eps
    tail distance        B = |u_K| / (1 - c) ,  u_K = - alpha g_K : how far all later steps can go, where T contracts
    tail gain            G = |g_K| B + (S / 2) B^2 ,  S: smoothness of L_H
    curvature            k_t = [L_H(w_t + h d) - 2 L_H(w_t) + L_H(w_t - h d)] / h^2 ,  d = u_t / |u_t|

    min_w0   P(w_0) + a max(0, D + G - m)                      long term: what the attacker gains at most
             + b softplus(c - c_max)                           contraction: later steps die out
             + e sum_t softplus(k_min - k_t)                   trap: steep walls along the attacker's way
             - f L_H(w_0)                                      inverse

P is the denoising loss of benign images. The gradient goes back through the K steps. No Hessian is formed: products
with it are central differences of gradients, or double backward passes (`hypergradient`). The directions d and v, and
the lengths eps and h, count as constants.

Differences from the paper: unknown beyond the above. The digest leaves open what is decided here: u_K is the update
that would follow w_K; where c is above 0.99, B is computed with 0.99, so that it stays finite; eps and h are parts of
the norm of the weights; D, c and G are measured on one batch of a round, k_t on the batch of step t; P is the denoising
loss of benign images.
Differences from the released code: there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register
from harness.core.search import around
from harness.core.sharding import exact_when_compiled, global_batch, hypergradient_mode

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run
    from harness.training.concept_loss import ConceptLoss
    from harness.training.diffusion import LossPart
    from harness.training.weights import Vector

Rate = Annotated[float, Field(gt=0, le=10)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Part = Annotated[float, Field(gt=0, le=1)]
CEILING = 0.99
"""Greatest contraction that the tail distance is computed with."""


@dataclass(frozen=True)
class Parameters:
    """Defaults are ours: the digest has none."""

    trained: Literal["cross_attention", "attention", "unet"] = "attention"
    """Weights that are released, and that the simulated attacker trains."""
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    learning_rate: Rate = 1e-5
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    lower_steps: Annotated[int, Field(ge=1, le=100)] = 3
    """K"""
    lower_learning_rate: Rate = 1e-2
    """alpha, of SGD."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Global: over all processes."""
    hypergradient: Literal["exact", "finite_difference"] = "finite_difference"
    primary: Weight = 1.0
    """Weight of P; 0 leaves the benign images out."""
    benign: Literal["class", "preserved"] = "class"
    """Images of P: those of the targets' class, or of preserved concepts."""
    class_images: Annotated[int, Field(ge=1, le=10_000)] = 200
    long_term: Weight = 1.0
    """a"""
    margin: Annotated[float, Field(ge=-1000, le=1000)] = 0.0
    """m: the gain that is tolerated."""
    smoothness: Weight = 1.0
    """S"""
    contraction: Weight = 1.0
    """b"""
    most_contraction: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """c_max"""
    probe: Part = 1e-2
    """eps, as a part of the norm of the weights."""
    trap: Weight = 1.0
    """e"""
    least_curvature: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.1
    """k_min"""
    reach: Part = 1e-2
    """h, as a part of the norm of the weights."""
    inverse: Weight = 0.1
    """f"""
    flip: bool = True
    """Mirror half of the images at random."""

    def __post_init__(self) -> None:
        """Reject an objective without any term on the attacker."""
        if not (self.long_term or self.contraction or self.trap or self.inverse):
            raise ValueError("long_term, contraction, trap and inverse are all 0: nothing is immunized")


@register("defense")
class ClampLike(Defense):
    """CLAMP-like, second-hand: the four terms of a digest of CLAMP (CVPR 2026), not the authors' method."""

    name = "clamp_like"
    version = 1
    threat_model = ThreatModel(changes=("unet",))
    uses = frozenset({"targets", "preserved", "images", "seed"})
    can_shard = True
    Parameters = Parameters
    quick = {
        "rounds": 2, "batch_size": 2, "class_images": 2, "lower_steps": 2, "learning_rate": 1e-3, "inverse": 1.0,
        "trained": "cross_attention",
    }  # fmt: skip
    presets = {
        # for the embedded testbed: first setting, not tuned (docs/presets.md)
        "testbed": {
            "trained": "cross_attention", "rounds": 100, "learning_rate": 2.5e-4, "batch_size": 4,
            "lower_learning_rate": 5e-2, "class_images": 96, "inverse": 1.0,
        },
    }  # fmt: skip

    @classmethod
    def used(cls, parameters) -> frozenset[str]:
        """Leave out the preserved concepts where P does not read them."""
        reads = parameters.primary and parameters.benign == "preserved"
        return cls.uses if reads else cls.uses - {"preserved"}

    @classmethod
    def search_space(cls, parameters):
        """Vary the rate and the weights that are not 0."""
        names = ("learning_rate", "primary", "long_term", "contraction", "trap", "inverse")
        return {name: around(getattr(parameters, name)) for name in names if getattr(parameters, name)}

    @classmethod
    def prior_images(cls, parameters) -> int:
        """The number of class images per target, if P reads them."""
        return parameters.class_images if parameters.primary and parameters.benign == "class" else 0

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """The attacker's steps, both ends, the probe, two gradients for each curvature, P, and the products H v."""
        p = parameters
        gradients = p.lower_steps + 3 + (2 * p.lower_steps if p.trap else 0) + bool(p.primary)
        products = p.lower_steps + 2
        return (
            p.rounds
            * p.batch_size
            * (gradients + {"exact": 7 / 3, "finite_difference": 2}[p.hypergradient] * products)
            * 3.0
        )

    @classmethod
    def check_task(cls, parameters, targets, preserved) -> list[tuple[str, str]]:
        """Reject benign images of preserved concepts where the task has none."""
        if parameters.primary and parameters.benign == "preserved" and not preserved:
            return [("benign", "the task preserves no concept; list some under 'preserve', or use class")]
        return []

    @classmethod
    def check_compiled(cls, parameters) -> list[tuple[str, str]]:
        """Reject second derivatives."""
        return list(exact_when_compiled(parameters.hypergradient))

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Reject settings that do not work with several processes."""
        mode = hypergradient_mode(parameters.hypergradient, sharding)
        return [*global_batch(parameters, sharding), *([mode] if mode else [])]

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the immunized weights."""
        from harness.training.loop import StepOver, train

        made = _Immunization(self.parameters, model, targets, preserved, run)
        train(run, StepOver(made.step, made.weights), self.parameters.rounds, "CLAMP-like")
        return Protection(tensors=made.weights.whole(made.names))


@dataclass
class _Way:
    """The simulated attacker's way: points w_0 .. w_K, and gradient and loss at all but the last."""

    points: list[Vector]  # the first is empty: these weights are installed
    slopes: list[Vector]
    values: list[Tensor]


class _Immunization:
    """One run of the method."""

    def __init__(
        self,
        p: Parameters,
        model: DiffusionModel,
        targets: Sequence[ProtectedConcept],
        preserved: Sequence[ProtectedConcept],
        run: Run,
    ):
        from harness.training import sharding
        from harness.training.selection import select
        from harness.training.weights import Level

        self.p, self.model, self.run = p, model, run
        self.names = select(model.parameters(), p.trained)
        self.harmful = self._loss("harmful", targets, "")
        self.kept = None
        if p.primary:
            which = (targets, "prior_") if p.benign == "class" else (preserved, "")
            self.kept = self._loss("benign", *which)
        level = Level(tuple(self.names), p.learning_rate, p.weight_decay, p.clip_norm)
        self.weights = sharding.spread(model, model.change(self.names), {"released": level}, run)

    def step(self, index: int) -> dict[str, Tensor]:
        """Simulate the attacker, collect the gradients of all terms back through its steps, and step once."""
        p, weights = self.p, self.weights
        first = index * (p.lower_steps + 1)
        losses = [self.harmful.at(first + k) for k in range(p.lower_steps)]
        judge = self.harmful.at(first + p.lower_steps)
        slope = weights.gradient(judge, self.names)  # of the released weights, on the batch that judges both ends
        start = self._mean(judge)
        length = weights.norm(weights.read(self.names))
        way = self._attacked(losses)
        end = _End(self, judge, start, length, index)
        cotangent = end.gradient(way.points[-1])
        numbers = {"harmful_loss": start, **end.numbers}
        if p.trap:
            numbers["curvature"] = length.new_zeros(())
        for t in reversed(range(p.lower_steps)):
            cotangent = self._pulled_back(losses[t], way.points[t], cotangent)
            if p.trap:
                curvature = self._add_trap(cotangent, losses[t], way, t, p.reach * length)
                numbers["curvature"] = numbers["curvature"] + curvature / p.lower_steps
        for name, value in slope.items():
            cotangent[name].add_(value.mul_(end.active - p.inverse).to(cotangent[name].device))
        if self.kept:
            kept = self.kept.at(index, p.primary)
            for name, value in weights.gradient(kept, self.names).items():
                cotangent[name].add_(value.to(cotangent[name].device))
            numbers["primary_loss"] = self._mean(kept)
        weights.step("released", cotangent)
        return numbers

    def _attacked(self, losses: Sequence[Sequence[LossPart]]) -> _Way:
        """Take the attacker's steps; the installed weights are unchanged."""
        from harness.training.weights import installed

        way = _Way([{}], [], [])
        for loss in losses:
            with installed(self.weights, way.points[-1]):
                slope = self.weights.gradient(loss, self.names)
                following = self.weights.read(self.names)
            way.slopes.append(slope)
            way.values.append(self._mean(loss))
            for name, value in following.items():
                value.add_(slope[name].to(value.device), alpha=-self.p.lower_learning_rate)
            way.points.append(following)
        return way

    def _pulled_back(self, loss: Sequence[LossPart], point: Vector, cotangent: Vector) -> Vector:
        """Return the gradient with respect to a point, from that with respect to the point after a step on `loss`."""
        from harness.training.bilevel import LookAhead

        one = LookAhead(self.weights, self.names, self.names, [loss], self.p.lower_learning_rate)
        return one.pull_back((point,), cotangent, self.p.hypergradient)

    def _add_trap(self, total: Vector, loss: Sequence[LossPart], way: _Way, t: int, reach: Tensor) -> Tensor:
        """Add the gradient of the trap at w_t; return the curvature."""
        from harness.training.weights import installed

        p, weights, along = self.p, self.weights, way.slopes[t]
        # -u_t has the gradient's direction, and a second difference is the same both ways
        step = reach / weights.norm(along).clamp(min=1e-30)
        sides, values = [], []
        with installed(weights, way.points[t]):
            for sign in (1.0, -1.0):
                sides.append(self._shifted(along, sign * step, lambda: weights.gradient(loss, self.names)))
                values.append(self._mean(loss))
        curvature = (values[0] - 2 * way.values[t] + values[1]) / reach**2
        factor = -p.trap * (p.least_curvature - curvature).sigmoid() / reach**2
        for name, value in total.items():
            second = sides[0][name].add_(sides[1][name]).sub_(along[name].to(sides[0][name].device), alpha=2)
            value.add_(second.mul_(factor).to(value.device))
        return curvature

    def _shifted(self, vector: Vector, scale: Tensor, do):
        """Return `do()` where scale * vector is added to the installed weights; they are put back bit for bit."""
        before = self.weights.read(list(vector))
        self.weights.shift(vector, scale)
        try:
            return do()
        finally:
            self.weights.write(before)

    def _mean(self, parts: Sequence[LossPart]) -> Tensor:
        """Return the mean loss at the last call over all processes, which decide alike by it; fp64."""
        import torch

        own = torch.as_tensor(sum(part.value.double() * len(part.batch) for part in parts))
        own = own / sum(len(part.batch) for part in parts)
        return own if self.run.world.size == 1 else torch.tensor(self.run.world.mean(float(own)), dtype=torch.float64)

    def _loss(self, purpose: str, concepts: Sequence[ProtectedConcept], which: Literal["", "prior_"]) -> ConceptLoss:
        from harness.training.concept_loss import ConceptLoss

        images, captions = (
            [item for c in concepts for item in getattr(c, f"{which}{what}")] for what in ("images", "captions")
        )
        seed = self.run.seed_for("noise", purpose)
        return ConceptLoss(
            self.model, self.run, images, captions, batch_size=self.p.batch_size, flip=self.p.flip, seed=seed
        )


class _End:
    """The terms at the end of the attacker's way: what it gained, what it can still gain, and the contraction there."""

    def __init__(self, of: _Immunization, judge: Sequence[LossPart], start: Tensor, length: Tensor, index: int):
        self.of, self.judge, self.start, self.index = of, judge, start, index
        self.eps = of.p.probe * length
        self.active: Tensor = start.new_zeros(())  # a, where the long term counts: the weight of both ends' losses
        self.numbers: dict[str, Tensor] = {}

    def gradient(self, end: Vector) -> Vector:
        """Return the gradient of the long term and of the contraction with respect to w_K."""
        from harness.training.bilevel import hessian_vector
        from harness.training.weights import installed

        of, weights, names, p = self.of, self.of.weights, self.of.names, self.of.p
        alpha, v = p.lower_learning_rate, self._probe()
        with installed(weights, end):
            slope = weights.gradient(self.judge, names)
            last = of._mean(self.judge)
            probed = of._shifted(v, self.eps, lambda: weights.gradient(self.judge, names))
            # (T(w_K + eps v) - T(w_K)) / eps
            change = {
                n: probed[n].sub_(slope[n]).mul_(-alpha / self.eps).add_(v[n].to(probed[n].device)) for n in names
            }
            c, norm = weights.norm(change), weights.norm(slope)
            of_norm, of_c = self._factors(c, norm, last)
            # d|g| = H g / |g|;  d c = -alpha / eps [H(w_K + eps v) - H(w_K)] r / |r|
            lean = of_c * alpha / (self.eps * c.clamp(min=1e-30))
            pull = of_norm / norm.clamp(min=1e-30)
            here = {n: slope[n] * pull + change[n] * lean for n in names}
            total = hessian_vector(weights, self.judge, names, here, p.hypergradient)
            there = of._shifted(
                v, self.eps, lambda: hessian_vector(weights, self.judge, names, change, p.hypergradient)
            )
        for name, value in total.items():
            value.sub_(there[name].mul_(lean)).sub_(slope[name].mul_(self.active))
        return total

    def _factors(self, c: Tensor, norm: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the objective by |g_K| and by c; note the weight of the ends, and the numbers."""
        p = self.of.p
        alpha, rest = p.lower_learning_rate, 1 - c.clamp(max=CEILING)
        distance = alpha * norm / rest
        tail = norm * distance + p.smoothness / 2 * distance**2
        gain = self.start - last
        self.active = p.long_term * (gain + tail > p.margin).to(norm)
        self.numbers = {"gain": gain, "tail_gain": tail, "contraction": c}
        of_norm = self.active * (2 * distance + p.smoothness * distance * alpha / rest)
        in_tail = self.active * (norm + p.smoothness * distance) * distance / rest * (c < CEILING)
        return of_norm, in_tail + p.contraction * (c - p.most_contraction).sigmoid()

    def _probe(self) -> Vector:
        """Return a random vector of norm 1; the same for any number of processes."""
        import torch

        from harness.model.transfer import to_device

        weights, names = self.of.weights, self.of.names
        generator = torch.Generator().manual_seed(self.of.run.seed_for("probe", self.index))
        vector = {}
        for name, shape in weights.shapes(names).items():
            drawn = to_device(torch.randn(shape, generator=generator), self.of.model.device)
            vector |= weights.pieces({name: drawn})
        norm = weights.norm(vector)
        return {name: value.div_(norm) for name, value in vector.items()}
