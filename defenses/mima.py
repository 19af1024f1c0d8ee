"""MIMA: immunize a model against adaptation to several concepts at once.

Zheng & Yeh, "Multi-concept Model Immunization through Differentiable Model Merging", AAAI 2025 (arXiv 2412.15320).
Algorithm 1, for k = 1 .. K:

    theta'_n = theta - alpha * grad L(x^l_n, c_n; theta)  on S^l, for every concept n, all from the same theta
    theta'   = Merge({theta'_n})
    theta   <- theta + beta * grad_theta  sum_n L(x^u_n, c_n; theta')  on S^u

Merge combines key and value projections of cross-attention by constrained least squares on the concepts' words
(`harness/training/merge.py`), and every other weight by the mean. The lower step is virtual: the next round starts
again from theta. AdamW ascends the upper level; the mean over concepts replaces the sum, as in the released code (this
makes no difference to AdamW, but would to clipping).

Profiles set the parameters that are None:
    paper     Algorithm 1: the lower step is undone (`lower_persist` false), the gradient goes through Merge and through
              the lower step (`grad_through_merge`, `hypergradient` finite_difference), no prior terms, no clipping.
    released  as train.py: lower and upper steps alternate on separate batches; merged weights are kept, all other lower
              weights take AdamW steps along the mean gradient; no gradient through Merge or the lower step; prior
              preservation on both levels with weight 1; the upper gradient clipped to norm 1. Weights outside S^u
              drift during training and are not released.
              `concept_key: class` also reproduces its key: batches are keyed by the class prompt, so if concepts
              share a class, only the last one listed is trained, and its words in Merge are the class prompt's.

Not known from the paper, and therefore settings: whether Hessian terms are kept, whether Merge stays close to the
current weights or to the released ones (`merge_base`), S^l and S^u for each attack, rates, clipping, how weights
outside K/V merge.

Added here: `retain` bounds what the ascent may cost (docs/constrained.md); it is part of neither paper nor code.

Differences from the released code in both profiles: by default a concept is keyed by its instance prompts, and Merge
uses the words of all of them, or of templates (released: the class word in two templates, with leading tokens cut);
C_reg is a fixed list that ships with the suites (released: 200 captions drawn from a hub data set at every merge,
`regularization: resample`), so Merge is factored once and not 32 times per step; it has a ridge and a rule for
dependent words; losses use encoded images, with gradients only for the weights that a level trains; images are not
rescaled at random, and are resized by LANCZOS. The released script of personalization uses 2 class images a concept,
that of re-learning 200; the default is 200 for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from harness.contracts.defense import ProtectedConcept
from harness.contracts.protection import Protection, ThreatModel
from harness.core.described import optional
from harness.core.profiles import ByProfile
from harness.core.registry import register
from harness.core.search import Choice, Range, Space, around
from harness.core.sharding import exact_when_compiled, global_batch, hypergradient_mode
from harness.training.retain import Retain, Retaining, with_few_rounds

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run
    from harness.training.diffusion import EncodedImages

Rate = Annotated[float, Field(gt=0, le=1000)]
Weight = Annotated[float, Field(ge=0, le=100)]
LowerSet = Literal["unet", "attention", "cross_attention", "cross_attention_kv"]

_PROFILES: dict[str, dict[str, Any]] = {
    "paper": {
        "lower_persist": False,
        "hypergradient": "finite_difference",
        "grad_through_merge": True,
        "prior_on_lower": 0.0,
        "prior_on_upper": 0.0,
        "clip_norm": None,
    },
    "released": {
        "lower_persist": True,
        "hypergradient": "first_order",
        "grad_through_merge": False,
        "prior_on_lower": 1.0,
        "prior_on_upper": 1.0,
        "clip_norm": 1.0,
    },
}


@dataclass(frozen=True)
class Parameters(ByProfile):
    """Defaults: those of the released scripts; the paper's values could not be read. None: set by the profile."""

    profile: Literal["paper", "released"] = "paper"
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """K, upper updates; the released run has 1000 iterations, half of them upper."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Images of each concept per step; global: over all processes."""
    lower_steps: Annotated[int, Field(ge=1, le=100)] = 1
    """Virtual steps of each look-ahead, or lower iterations before each upper one."""
    lower_learning_rate: Rate = 1e-5
    """alpha; 5e-6 in the released scripts, which double it with prior preservation."""
    upper_learning_rate: Rate = 3e-5
    """beta; in the released scripts 3e-5 for re-learning and 2e-5 for personalization."""
    lower_parameters: LowerSet = "unet"
    """S^l"""
    upper_parameters: LowerSet = "cross_attention"
    """S^u"""
    lower_persist: bool | None = None
    """true: lower steps are kept (released); false: they are a virtual look-ahead (Algorithm 1)."""
    hypergradient: Literal["first_order", "exact", "finite_difference"] | None = None
    grad_through_merge: bool | None = None
    """false: the gradient with respect to the merged weights is used directly, without differentiating further."""
    merge_base: Literal["current", "pretrained"] = "current"
    """The weights that Merge stays close to: those of the current round, or those before immunization."""
    prior_on_lower: Weight | None = None
    """Weight of the loss on class images at the lower level."""
    prior_on_upper: Weight | None = None
    """Weight of the loss on class images at the upper level, which minimizes it."""
    prior_from: Literal["class", "preserved"] = "class"
    """Source of the prior images: the concept's class (papers and code), or the concepts that the task lists under
    `preserve` (added here, for class prompts that do not cover what must be preserved)."""
    prior_images: Annotated[int, Field(ge=1, le=10_000)] = 200
    """Class images per concept, used if a prior weight is above zero. 200 as in `relearn_train.sh`; the released
    `personalize_train.sh` has 2."""
    concept_key: Literal["instance", "class"] = "instance"
    concept_prompts: Annotated[tuple[Annotated[str, Field(pattern=r"\{\}")], ...], Field(min_length=1)] | None = None
    """Texts with {} for a concept's words: Merge constrains their tokens per concept. None: the captions of its images.
    The total number of tokens should be much smaller than the text encoder's width."""
    regularization_captions: Annotated[str, Field(min_length=1, max_length=4000)] = "captions"
    """C_reg: the name of a caption list that ships with the suites, or the path of a file with one caption per line."""
    regularization_count: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Number of captions used."""
    regularization: Literal["fixed", "resample"] = "fixed"
    """resample: draw new captions at every merge, as in the released code."""
    ridge: Annotated[float, Field(ge=0, le=1)] = 1e-6
    """Added to the diagonal of A = C_reg^T C_reg, times its mean eigenvalue; none in the released code."""
    constraint_ridge: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Added to M = C A^-1 C^T in the same way; above zero, the constraints hold only approximately."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Limit of the upper gradient's norm. None: set by the profile."""
    flip: bool = True
    retain: Retain | None = optional()
    """A bound on the loss on what must stay; None: no bound. Not in the paper."""

    def __post_init__(self) -> None:
        """Reject invalid combinations."""
        is_differentiated = self.chosen("hypergradient") != "first_order" or self.chosen("grad_through_merge")
        if self.chosen("lower_persist") and is_differentiated:
            raise ValueError(
                "lower steps that persist are not differentiated: set lower_persist: false, or hypergradient: "
                "first_order and grad_through_merge: false"
            )
        if not self.chosen("grad_through_merge") and self.chosen("hypergradient") != "first_order":
            raise ValueError(
                f"hypergradient '{self.chosen('hypergradient')}' goes through Merge: set grad_through_merge: true, or "
                "hypergradient: first_order"
            )

    def of_profile(self) -> Mapping[str, Any]:
        """Return the profile's values."""
        return _PROFILES[self.profile]

    @property
    def weighs_prior(self) -> bool:
        """Whether any level uses class images."""
        return bool(self.chosen("prior_on_lower") or self.chosen("prior_on_upper"))

    @property
    def own_prior_images(self) -> int:
        """The class images per target that losses and Merge use; one if only the class prompt is needed, as the key."""
        asks = self.weighs_prior and self.prior_from == "class"
        return self.prior_images if asks else int(self.concept_key == "class")


_TESTBED: dict[str, Any] = {
    "rounds": 100,
    "batch_size": 4,
    "prior_images": 96,
    "clip_norm": 1.0,
    "regularization_captions": "captions_testbed",
    "concept_prompts": ("{}", "a picture of {}"),
}


@register("defense")
class Mima(Retaining):
    """MIMA: ascent of the loss after per-concept look-aheads, merged in closed form."""

    name = "mima"
    version = 1
    threat_model = ThreatModel(changes=("unet.cross_attention",))
    uses = frozenset({"targets", "preserved", "images", "seed"})
    can_shard = True
    Parameters = Parameters
    quick = {"rounds": 2, "batch_size": 2, "prior_images": 2, "ridge": 1e-3, "hypergradient": "first_order"}
    presets = {
        # for the embedded testbed: a look-ahead with a clear effect; Algorithm 1 has no prior term (docs/presets.md)
        "testbed": {
            **_TESTBED,
            "lower_steps": 4,
            "lower_learning_rate": 5e-2,
            "upper_learning_rate": 2.2e-4,
            "prior_on_upper": 1.0,
        },
        # for the embedded testbed: the longest delay that kept 0.9 of the utility (docs/presets.md)
        "testbed_released": {
            **_TESTBED,
            "profile": "released",
            "lower_learning_rate": 1e-5,
            "upper_learning_rate": 2.5e-4,
            "prior_on_upper": 4.0,
        },
    }

    @classmethod
    def files(cls, parameters) -> dict[str, Path]:
        """The caption list."""
        from harness.core.captions import path

        return {"regularization_captions": path(parameters.regularization_captions), **super().files(parameters)}

    @classmethod
    def used(cls, parameters) -> frozenset[str]:
        """All of it."""
        return cls.uses

    @classmethod
    def prior_images(cls, parameters) -> int:
        """Class images per target: those of the method, or those of the bound if they are more."""
        return max(parameters.own_prior_images, super().prior_images(parameters))

    @classmethod
    def search_space(cls, parameters) -> Space:
        """Vary the rates of both levels, and the weight of the prior images if any level uses them."""
        space: dict[str, Range | Choice] = {
            "upper_learning_rate": around(parameters.upper_learning_rate, 4.0),
            "lower_learning_rate": around(parameters.lower_learning_rate),
        }
        prior = parameters.chosen("prior_on_upper")
        if prior:  # another value than 0 would need class images that the plan does not draw
            space["prior_on_upper"] = around(prior, 4.0)
        return space

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """A gradient per concept and level, and two more (or a double backward) through each lower step."""
        p = parameters
        lower = p.lower_steps * (2 if p.chosen("prior_on_lower") else 1)
        again = {"first_order": 0, "exact": 4 / 3, "finite_difference": 2}[p.chosen("hypergradient")]
        upper = 2 if p.chosen("prior_on_upper") else 1
        own = p.rounds * p.batch_size * targets * (lower * (1 + again) + upper) * 3.0
        return own + super().unet_passes(p, targets)

    @classmethod
    def rehearsed(cls, parameters) -> tuple[Parameters, int]:
        """One lower iteration before each upper one, if they alternate; a round of a look-ahead is one step."""
        parameters = with_few_rounds(parameters)
        if parameters.chosen("lower_persist"):
            return replace(parameters, lower_steps=1), 4
        return parameters, 2

    @classmethod
    def check_task(cls, parameters, targets, preserved) -> list[tuple[str, str]]:
        """Reject a prior weight without images for it."""
        if parameters.weighs_prior and parameters.prior_from == "preserved" and not preserved:
            return [("prior_from", "the task preserves no concept; list some under 'preserve', or use class")]
        return super().check_task(parameters, targets, preserved)

    @classmethod
    def check_compiled(cls, parameters) -> list[tuple[str, str]]:
        """Reject second derivatives."""
        return list(exact_when_compiled(parameters.chosen("hypergradient")))

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Reject settings that do not work with several processes."""
        found = [*global_batch(parameters, sharding), *super().check_sharding(parameters, sharding)]
        mode = hypergradient_mode(parameters.chosen("hypergradient"), sharding)
        return found + ([mode] if mode else [])

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the immunized weights of S^u."""
        return _Immunization(self.parameters, model, targets, run, preserved).run()


class _Immunization:
    """One run of MIMA."""

    def __init__(
        self,
        p: Parameters,
        model: DiffusionModel,
        targets: Sequence[ProtectedConcept],
        run: Run,
        preserved: Sequence[ProtectedConcept] = (),
    ):
        from harness.training import retention, sharding
        from harness.training.concept_loss import ConceptLoss
        from harness.training.selection import select
        from harness.training.weights import Level

        self.p, self.model, self.surroundings = p, model, run
        self._encoded_priors: dict[tuple, EncodedImages] = {}
        if p.concept_key == "class":  # as the released code's dictionary: a later concept replaces one of its class
            targets = list({target.prior_captions[0]: target for target in targets}.values())
        names = model.parameters()
        self.lower = select(names, p.lower_parameters)
        self.upper = select(names, p.upper_parameters)
        self.names = list(dict.fromkeys([*self.lower, *self.upper]))
        self.projections = frozenset(select(self.lower, "cross_attention_kv"))
        self.others = [name for name in self.lower if name not in self.projections]
        by_class, own = p.concept_key == "class", p.own_prior_images  # `retain` may ask for more class images
        self.words = [t.prior_captions[:own] if by_class else t.texts(p.concept_prompts) for t in targets]
        self.losses = [
            ConceptLoss(
                model,
                run,
                target.images,
                target.captions,
                batch_size=p.batch_size,
                flip=p.flip,
                seed=run.seed_for("noise", index),
                prior=self._prior(target, preserved),
            )
            for index, target in enumerate(targets)
        ]
        levels = {"upper": Level(tuple(self.upper), p.upper_learning_rate, p.weight_decay, p.chosen("clip_norm"))}
        # the engine gets all of S^l; key and value projections take no AdamW step
        levels["lower"] = Level(tuple(self.others), p.lower_learning_rate, p.weight_decay)
        levels["merged"] = Level(tuple(sorted(self.projections)), p.lower_learning_rate)
        levels = {name: level for name, level in levels.items() if level.names}
        self.weights = sharding.spread(model, model.change(self.names), levels, run)
        base = self.weights.read(sorted(self.projections)) if p.merge_base == "pretrained" else None
        self.reference = base
        self._targets = [self._encoded(texts) for texts in self.words]
        self._merging = None
        persisting = self.lower if p.chosen("lower_persist") else []
        unreleased = [name for name in persisting if name not in set(self.upper)]
        self.stays = retention.bound(
            p.retain, model, run, self.weights, (targets, preserved), self.upper, unreleased, p.rounds
        )

    def run(self) -> Protection:
        """Train and return the weights of S^u."""
        from harness.training.loop import StepOver, train

        p = self.p
        if p.chosen("lower_persist"):
            steps, step = p.rounds * (p.lower_steps + 1), self.alternating
        else:
            steps, step = p.rounds, self.looking_ahead
        train(self.surroundings, StepOver(step, self.stays), steps, "MIMA")
        return Protection(tensors=self.weights.whole(self.upper), curves=self.stays.curves())

    # -- Algorithm 1 -------------------------------------------------------------------------------------

    def looking_ahead(self, step: int) -> dict[str, Tensor]:
        """Do one round: look ahead for each concept, merge, and ascend the loss at the merged weights."""
        from harness.training import bilevel
        from harness.training.weights import installed

        p = self.p
        first = step * (p.lower_steps + 1)
        branches = [
            bilevel.LookAhead(
                self.weights,
                self.names,
                self.lower,
                [self._lower_loss(index, first + k) for k in range(p.lower_steps)],
                p.lower_learning_rate,
            )
            for index in range(len(self.losses))
        ]
        upper = self._upper_loss(first + p.lower_steps)
        merging = self.merging(first)
        if p.chosen("grad_through_merge"):
            slope = bilevel.merged_hypergradient(branches, merging, upper, p.chosen("hypergradient"), wanted=self.upper)
        else:
            with installed(self.weights, bilevel.merged(branches, merging).weights):
                slope = self.weights.gradient(upper, self.upper)
        self.weights.step("upper", self.stays.bounded(slope, step))
        lower = _mean(branch.losses[0] for branch in branches)
        return {"lower_loss": lower, "upper_loss": _mean([upper]), **self.stays.numbers()}

    # -- the released loop -------------------------------------------------------------------------------

    def alternating(self, step: int) -> dict[str, Tensor]:
        """Do one iteration: the lower level of all concepts, with the merged weights kept, or the upper level."""
        p = self.p
        if step % (p.lower_steps + 1) == p.lower_steps:
            upper = self._upper_loss(step)
            slope = self.weights.gradient(upper, self.upper)
            self.weights.step("upper", self.stays.bounded(slope, step // (p.lower_steps + 1)))
            return {"upper_loss": _mean([upper]), **self.stays.numbers()}
        merging = self.merging(step)
        losses = [self._lower_loss(index, step) for index in range(len(self.losses))]
        start = self.weights.read(sorted(self.projections))
        merged = merging.from_start({name: value.clone() for name, value in start.items()})
        mean = {}
        for index, loss in enumerate(losses):
            slope = self.weights.gradient(loss, self.lower)
            adapted = {name: start[name] - p.lower_learning_rate * slope[name] for name in start}
            merging.add_adapted(merged, index, adapted)
            for name in self.others:
                mean[name] = mean.get(name, 0.0) + slope[name] / len(losses)
        if self.others:
            self.weights.step("lower", mean)
        self.weights.settle(merged)
        return {"lower_loss": _mean(losses)}

    def _prior(self, target: ProtectedConcept, preserved: Sequence[ProtectedConcept]) -> EncodedImages | None:
        """Return the encoded prior images; images shared by several concepts are encoded once."""
        from harness.training.diffusion import encode_images

        p = self.p
        if not p.weighs_prior:
            return None
        if p.prior_from == "class":
            key = (target.prior_files[: p.prior_images], target.prior_captions[: p.prior_images])
        else:
            key = tuple(tuple(x for c in preserved for x in getattr(c, a)) for a in ("files", "captions"))
        if key not in self._encoded_priors:
            own = p.prior_from == "class"
            images = target.prior_images[: p.prior_images] if own else [i for each in preserved for i in each.images]
            self._encoded_priors[key] = encode_images(self.model, self.surroundings, images, key[1], flip=p.flip)
        return self._encoded_priors[key]

    # -- losses and Merge --------------------------------------------------------------------------------

    def _lower_loss(self, index: int, step: int):
        return self.losses[index].at(step, 1.0, self.p.chosen("prior_on_lower"))

    def _upper_loss(self, step: int):
        """Return -mean_n L(x^u_n) + prior, the loss that the upper level minimizes."""
        count, prior = len(self.losses), self.p.chosen("prior_on_upper")
        return [part for loss in self.losses for part in loss.at(step, -1 / count, prior / count)]

    def merging(self, step: int):
        """Return the merging of a step; the same for all steps unless C_reg is drawn again each time."""
        from harness.core import captions
        from harness.training.merge import LayerMerging, Merge

        p = self.p
        if self._merging is not None:
            return self._merging
        is_drawn = p.regularization == "resample"
        drawn = self.surroundings.seed_for("captions", step) if is_drawn else None
        texts = captions.read(p.regularization_captions, p.regularization_count, drawn)
        merge = Merge.solve(self._targets, self._encoded(texts), p.ridge, p.constraint_ridge)
        merge = merge.to(self.model.device)
        merging = LayerMerging(merge, self.projections, self.reference, self.weights.multiply)
        self._merging = None if is_drawn else merging
        return merging

    def _encoded(self, texts):
        """Return the words of texts in fp64 on the CPU, for the solver."""
        from harness.training import words

        return words.of(self.model, texts).cpu()


def _mean(losses) -> Tensor:
    """Return the mean of the losses' values, including class images, without signs and weights."""
    from harness.training.diffusion import mean_value

    values = [mean_value(loss) for loss in losses]
    return sum(values) / len(values)
