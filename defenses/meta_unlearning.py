"""Meta-Unlearning: erase a concept so that re-learning it also costs the model what is related to it.

Gao et al., "Meta-Unlearning on Diffusion Models: Preventing Relearning Unlearned Concepts", ICCV 2025 (arXiv
2410.12777), with ESD (`defenses/esd.py`) as the eraser. theta' are the weights after a malicious adaptation from theta,
L is the denoising loss, on data of three kinds (h: the erased concept, r: what is related to it, i: what is not):

    min_theta   L_ESD(theta) + g1_i L_i(theta) + g1_r L_r(theta)
                - g2_h L_h(theta') - g2_r L_r(theta') - g2_i L_i(theta')

An iteration takes K steps on L_h from theta over the whole UNet, adds up the gradients of all terms, and takes one step
of AdamW on theta. Here h are the images of the protected concepts, r images of their class (drawn by the base model),
and i the images of the preserved concepts.

`hypergradient` says how the terms at theta' depend on theta. first_order: as if theta' moved as theta does (its
derivative is 1), as released. With `exact` or `finite_difference` they are differentiated through the K steps, which
are plain SGD steps then (`harness.training.bilevel`).

Differences from the paper: its text could not be read; the loss is the one that the released ESD program descends.
Differences from the released code, `esd_meta.py`. (Its variant for UCE and RECE, `meta.py`, cannot run: a function
returns four values where three are taken, gradients that are None are added to, and a variable is used before it is
set.)
    - Each term uses one batch of an iteration, and its mean. Released: all batches of a loader, whose gradients are
      summed, so there the weights g depend on the size of the data.
    - K is a parameter. Released: one epoch of data that were not published.
    - h has one set of images for the adaptation and the term after it, with other draws. Released: two sets.
    - Images are cropped at the centre. Released: at random.
    - The option of four fixed timesteps is left out; the released script has it commented out.
    - The script gives `gamma2_1` three times. The defaults here are what it means (0.1, 0.1, 0.01); the preset
      `released_as_run` is what it does (0.01, 1, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from defenses import esd
from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register
from harness.core.search import Choice, around
from harness.core.sharding import exact_when_compiled, global_batch, hypergradient_mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run
    from harness.training.concept_loss import ConceptLoss
    from harness.training.weights import Loss, Vector

Rate = Annotated[float, Field(gt=0, le=10)]
Weight = Annotated[float, Field(ge=0, le=1000)]


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of the released ESD script, as it means them."""

    variant: Literal["full", "x", "x_strict", "u"] = "full"
    """The trained weights: all of the UNet, or a set of `esd`. The adaptation always trains all of it."""
    iterations: Annotated[int, Field(ge=1, le=1_000_000)] = 1500
    learning_rate: Rate = 1e-5
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Limit of the gradient norm, of the whole gradient and of each step of an adaptation by AdamW; null: none."""
    eta: Annotated[float, Field(ge=0, le=100)] = 3.0
    """Negative guidance of ESD's target ("concept_scale")."""
    sampling_guidance: Annotated[float, Field(ge=0, le=100)] = 3.0
    sampling_steps: Annotated[int, Field(ge=1, le=250)] = 50
    sampler: Literal["trained", "frozen"] = "trained"
    """Which network draws ESD's states: the one in training, as released, or the original (`esd`)."""
    pool: Annotated[int, Field(ge=1, le=100_000)] = 32
    """Trajectories of each concept, with the frozen sampler."""
    templates: Annotated[tuple[Annotated[str, Field(pattern=r"\{\}")], ...], Field(min_length=1)] = ("{}",)
    """Texts that name the concept; {} is replaced by its phrase."""
    erase_batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """States of ESD's loss in an iteration; global: over all processes."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 10
    """Images of each other term, and of each step of the adaptation; global."""
    lower_steps: Annotated[int, Field(ge=1, le=1000)] = 10
    """K. Released: one epoch of its data, whose number is not published."""
    lower_optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: plain steps without decay and clipping; required for differentiating through them."""
    lower_learning_rate: Rate = 1e-5
    hypergradient: Literal["first_order", "exact", "finite_difference"] = "first_order"
    irrelevant_before: Weight = 0.1
    """g1_i ("gamma1_1"): keeps what is not related."""
    related_before: Weight = 0.01
    """g1_r ("gamma1_2"): keeps what is related."""
    harmful_after: Weight = 0.1
    """g2_h ("gamma2_1"): hinders re-learning."""
    related_after: Weight = 0.1
    """g2_r ("gamma2_2"): what is related is to be lost with it."""
    irrelevant_after: Weight = 0.01
    """g2_i ("gamma2_3")."""
    related_images: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Images of the class of each concept. Released: its number is not published."""
    flip: bool = True
    """Mirror half of the images at random."""

    def __post_init__(self) -> None:
        """Reject combinations that cannot work."""
        if self.hypergradient != "first_order" and self.lower_optimizer != "sgd":
            raise ValueError(
                f"hypergradient '{self.hypergradient}' differentiates the adaptation's steps: add lower_optimizer: sgd"
            )
        if self.sampler == "frozen" and self.pool < len(self.templates):
            raise ValueError(f"pool must be at least the number of templates, {len(self.templates)} (got {self.pool})")
        if not (self.harmful_after or self.related_after or self.irrelevant_after):
            raise ValueError("all weights after the adaptation are 0: this is esd; set harmful_after, or use esd")

    @property
    def uses_irrelevant(self) -> bool:
        """Whether a term reads images of preserved concepts."""
        return bool(self.irrelevant_before or self.irrelevant_after)

    @property
    def uses_related(self) -> bool:
        """Whether a term reads images of the class."""
        return bool(self.related_before or self.related_after)

    def eraser(self) -> esd.Parameters:
        """Return ESD's parameters for its states."""
        return esd.Parameters(
            eta=self.eta, sampling_guidance=self.sampling_guidance, sampling_steps=self.sampling_steps,
            sampler=self.sampler, pool=self.pool, batch_size=self.erase_batch_size, templates=self.templates,
        )  # fmt: skip


@register("defense")
class MetaUnlearning(Defense):
    """Meta-Unlearning of ESD: erases a concept so that re-learning it costs what is related to it."""

    name = "meta_unlearning"
    version = 1
    threat_model = ThreatModel(changes=("unet",))
    uses = frozenset({"targets", "preserved", "images", "seed"})
    can_erase = True
    can_shard = True
    Parameters = Parameters
    quick = {
        "variant": "x", "iterations": 3, "learning_rate": 1e-3, "lower_learning_rate": 1e-3, "sampling_steps": 4,
        "erase_batch_size": 2, "batch_size": 2, "lower_steps": 2, "related_images": 2, "sampler": "frozen", "pool": 2,
    }  # fmt: skip
    presets = {
        # what the released script does: it gives gamma2_1 three times, and the last one counts
        "released_as_run": {"harmful_after": 0.01, "related_after": 1.0, "irrelevant_after": 1.0},
        # for the embedded testbed: first setting, not tuned (docs/presets.md)
        "testbed": {
            "variant": "x", "iterations": 300, "learning_rate": 2e-4, "eta": 1.0, "sampling_steps": 25,
            "sampler": "frozen", "pool": 16, "erase_batch_size": 8, "batch_size": 4, "lower_steps": 2,
            "lower_learning_rate": 3e-4, "related_images": 24, "templates": esd.Esd.presets["testbed"]["templates"],
        },
    }  # fmt: skip

    @classmethod
    def used(cls, parameters) -> frozenset[str]:
        """Leave out the preserved concepts if no term reads them."""
        return cls.uses if parameters.uses_irrelevant else cls.uses - {"preserved"}

    @classmethod
    def search_space(cls, parameters):
        """Vary the rate, the eraser's strength, and what an adaptation is to cost."""
        p = parameters
        return {
            "learning_rate": around(p.learning_rate),
            "eta": Choice(tuple(sorted({1.0, p.eta, 3.0}))),
            **({"harmful_after": around(p.harmful_after)} if p.harmful_after else {}),
            **({"related_after": around(p.related_after)} if p.related_after else {}),
        }

    @classmethod
    def prior_images(cls, parameters) -> int:
        """The number of class images per target, if a term uses them."""
        return parameters.related_images if parameters.uses_related else 0

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """Passes of ESD; a gradient for each other term and each step of the adaptation, and the passes of H v."""
        p = parameters
        before = sum(bool(weight) for weight in (p.irrelevant_before, p.related_before))
        after = sum(bool(weight) for weight in (p.harmful_after, p.related_after, p.irrelevant_after))
        again = {"first_order": 0, "exact": 4 / 3, "finite_difference": 2}[p.hypergradient]
        erasing = replace(p.eraser(), iterations=p.iterations)
        lower = p.lower_steps * (1 + again)
        return esd.Esd.unet_passes(erasing, targets) + p.iterations * p.batch_size * (before + after + lower) * 3.0

    @classmethod
    def rehearsed(cls, parameters) -> tuple[Parameters, int]:
        """Two iterations over short trajectories, with two steps of the adaptation, which hold all its vectors."""
        p = parameters
        steps = p.lower_steps if p.hypergradient != "first_order" else min(p.lower_steps, 2)
        return replace(p, sampling_steps=min(p.sampling_steps, 4), lower_steps=steps), 2

    @classmethod
    def check_task(cls, parameters, targets, preserved) -> list[tuple[str, str]]:
        """Reject terms on preserved concepts where the task has none."""
        if not parameters.uses_irrelevant or preserved:
            return []
        found = "irrelevant_before" if parameters.irrelevant_before else "irrelevant_after"
        return [(
            found,
            "the task preserves no concept; list some under 'preserve', or set irrelevant_before and irrelevant_after "
            "to 0",
        )]  # fmt: skip

    @classmethod
    def check_compiled(cls, parameters) -> list[tuple[str, str]]:
        """Reject second derivatives."""
        return list(exact_when_compiled(parameters.hypergradient))

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Reject settings that do not work with several processes."""
        p = parameters
        found = list(global_batch(p, sharding))
        if p.erase_batch_size % sharding.workers:
            found.append((
                "erase_batch_size",
                f"{sharding.workers} workers do not divide {p.erase_batch_size} states; change erase_batch_size or "
                "resources.workers",
            ))  # fmt: skip
        if p.sampler == "trained" and sharding.needs_deepspeed and sharding.zero_stage == 3:
            found.append((
                "sampler",
                "trained needs the original's whole weights, which ZeRO 3 partitions; use frozen, or "
                "resources.zero_stage 2 or less",
            ))  # fmt: skip
        mode = hypergradient_mode(p.hypergradient, sharding)
        return found + ([mode] if mode else [])

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the trained tensors of the UNet."""
        from harness.training.loop import StepOver, train

        made = _Unlearning(self.parameters, model, targets, preserved, run)
        p = self.parameters
        train(run, StepOver(made.step, made.weights), p.iterations, "meta-unlearning")
        shapes = made.weights.shapes(made.upper).values()
        run.ledger.numbers |= {
            "general_samples": 0,
            "concept_samples": p.iterations
            * (p.erase_batch_size + p.batch_size * (p.lower_steps + bool(p.harmful_after))),
            "trainable_parameters": sum(math.prod(shape) for shape in shapes),
        }
        return Protection(tensors=made.weights.whole(made.upper))


class _Unlearning:
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
        from harness.training.diffusion import own_share
        from harness.training.selection import select
        from harness.training.weights import Level

        self.p, self.model, self.run = p, model, run
        self.lower = select(model.parameters(), "unet")
        self.upper = self.lower if p.variant == "full" else esd.trained_names(self.lower, p.variant)
        changed = model.change(self.lower)
        trained = {name: changed[name] for name in self.upper}
        # before anything is trained or spread: ESD's sources keep the original's predictions or weights
        source = esd.Pool if p.sampler == "frozen" else esd.Fresh
        self.states = source(model, run, p.eraser(), [target.phrase for target in targets], trained)
        self.harmful = self._loss("harmful", targets)
        self.related = self._loss("related", targets, prior=True) if p.uses_related else None
        self.irrelevant = self._loss("irrelevant", preserved) if p.uses_irrelevant else None
        share = own_share(p.erase_batch_size, run)
        self.own = slice(share.start, share.stop)
        levels = {"released": Level(tuple(self.upper), p.learning_rate, p.weight_decay, p.clip_norm)}
        if p.variant != "full":  # these get gradients too, but no step
            levels |= sharding.no_levels(self.lower)
        self.weights = sharding.spread(model, changed, levels, run)

    def step(self, index: int) -> dict[str, Tensor]:
        """Adapt, collect the gradients of all terms, and step once."""
        from harness.training.diffusion import mean_value

        p = self.p
        first = index * (p.lower_steps + 1)
        erased = esd.Distance(self.model, self.run, self.states.draw(index, self.own))
        before = [erased, *self._terms(2 * index, p.irrelevant_before, p.related_before)]
        harmful = self.harmful.at(first + p.lower_steps, -p.harmful_after) if p.harmful_after else []
        after = [*harmful, *self._terms(2 * index + 1, -p.irrelevant_after, -p.related_after)]
        lower = [self.harmful.at(first + k) for k in range(p.lower_steps)]
        slope = self._after_adaptation(lower, after)
        for name, value in self.weights.gradient(before, self.upper).items():
            slope[name] = value.add_(slope[name].to(value.device))
        self.weights.step("released", slope)
        numbers = {"erased_loss": erased.value, "adaptation_loss": mean_value(lower[-1])}
        return numbers | ({"harmful_after_loss": mean_value(harmful)} if harmful else {})

    def _after_adaptation(self, lower: Sequence[Loss], after: Loss) -> Vector:
        """Return the gradient of the terms after an adaptation, on the weights that are released."""
        from harness.training import bilevel
        from harness.training.simulated import simulated
        from harness.training.weights import installed

        p, weights = self.p, self.weights
        if p.lower_optimizer == "sgd":
            ahead = bilevel.LookAhead(weights, self.lower, self.lower, lower, p.lower_learning_rate)
            return bilevel.hypergradient(ahead, ahead.adapted(), after, p.hypergradient, self.upper)
        end = simulated(
            weights, self.lower, lower,
            learning_rate=p.lower_learning_rate, weight_decay=p.weight_decay, clip_norm=p.clip_norm,
        )  # fmt: skip
        with installed(weights, end):
            return weights.gradient(after, self.upper)

    def _terms(self, batch: int, irrelevant: float, related: float) -> Loss:
        """Return the weighted losses on what is to be kept before an adaptation, or lost after it."""
        pairs = ((self.irrelevant, irrelevant), (self.related, related))
        return [part for loss, weight in pairs if weight for part in loss.at(batch, weight)]

    def _loss(self, purpose: str, concepts: Sequence[ProtectedConcept], *, prior: bool = False) -> ConceptLoss:
        """Return the denoising loss on the images of concepts, or on those of their classes, all together."""
        from harness.training.concept_loss import ConceptLoss

        images, captions = (
            [item for concept in concepts for item in getattr(concept, f"prior_{what}" if prior else what)]
            for what in ("images", "captions")
        )
        return ConceptLoss(
            self.model, self.run, images, captions,
            batch_size=self.p.batch_size, flip=self.p.flip, seed=self.run.seed_for("noise", purpose),
        )  # fmt: skip
