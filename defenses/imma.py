"""IMMA: immunize a model against adaptation to one concept.

Zheng & Yeh, "IMMA: Immunizing Text-to-Image Models against Malicious Adaptation", ECCV 2024 (arXiv 2311.18815):

    max_{theta in S} L(x_I, c; theta, phi*)    s.t.   phi* = argmin_phi L(x_A, c; theta, phi)

with L the denoising loss, phi the weights that the attack trains and S the attention projections of the UNet. The two
levels alternate; phi continues from its last value (Algorithm 1, as restated by a third party: the paper's own text
could not be read).

Lower levels (phi): `lora` and `dreambooth_lora`, an adapter on the UNet; `dreambooth`, the whole UNet, of which only S
is released and the rest is discarded; `textual_inversion`, the embedding of one new word. The default rates are those
of the released script for each. The lower level may include DreamBooth's loss on class images (`prior_weight`).

Profiles
    paper     each step of a round draws its own batch: first the lower steps, then one upper step; no clipping.
    released  one batch per step; the step's index decides the level. With lora and textual_inversion the index restarts
              in each epoch, so an epoch with an odd number of batches gives two lower steps in a row; with the others
              it does not restart. Gradients are clipped to norm 1 on both levels, except with textual_inversion.

Added here: `hypergradient`. Papers and code treat phi* as a constant (first_order). With `exact` or `finite_difference`
the lower steps of a round are SGD steps, and the upper gradient is that of the loss after these steps with respect to
the weights before them, so it includes the weights' effect on the attack. `ascent_only` drops the lower level (the
code's `--max`); this ablation measures the benefit of the lower level. `retain` bounds what the ascent may cost
(docs/constrained.md); it is part of neither paper nor code.

Differences from earlier code of version 1: `lower_optimizer: sgd` with first_order now takes SGD steps in the usual
alternation, with decay and clipping; before, it looked ahead. The version number is the same, since no bundled suite or
preset uses this setting.

Differences from the paper: its text does not give the optimizers; both levels use AdamW, as in the code.
Differences from the released code: each level computes only the gradients that it needs (the code accumulates gradients
in the whole UNet and never clears them); latents and text embeddings are encoded once; images are resized by LANCZOS
and cropped at the centre (released: bilinear, random crop by default); DreamBooth's loss on class images is
part of the lower level alone (released: if switched on, both levels, so that the upper level unlearns the class too);
`--reinitialize_lora`, which has no effect in the released code, is left out; DB+LoRA works (it cannot run in the
released code); a smaller last batch of an epoch is filled from the next epoch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contracts.defense import ProtectedConcept
from harness.contracts.protection import Protection, ThreatModel
from harness.core.described import optional
from harness.core.profiles import ByProfile
from harness.core.registry import register
from harness.core.search import Choice, Space, around
from harness.core.sharding import exact_when_compiled, global_batch, hypergradient_mode
from harness.training.retain import Retain, Retaining, with_few_rounds

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run

Rate = Annotated[float, Field(gt=0, le=10)]
_LOWER_RATES = {"lora": 1e-4, "dreambooth": 5e-6, "dreambooth_lora": 5e-6, "textual_inversion": 5e-4}
_UPPER_RATES = {"lora": 1e-5, "dreambooth": 2e-5, "dreambooth_lora": 2e-5, "textual_inversion": 1e-6}


@dataclass(frozen=True)
class Parameters(ByProfile):
    """Defaults: those of the released scripts; the paper's values could not be read (papers' facts: "not found")."""

    profile: Literal["paper", "released"] = "paper"
    lower: Literal["lora", "dreambooth", "dreambooth_lora", "textual_inversion"] = "lora"
    """Which adaptation the lower level simulates."""
    ascent_only: bool = False
    """No lower level: gradient ascent on the concept's loss."""
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Upper updates. The released runs have 1000 iterations, half of them upper; but 400 with textual_inversion and the
    five images of its script, since its index restarts in each epoch."""
    lower_steps: Annotated[int, Field(ge=1, le=100)] = 1
    """Lower updates per upper update."""
    hypergradient: Literal["first_order", "exact", "finite_difference"] = "first_order"
    """How the upper gradient treats the lower steps. first_order: ignores them; the levels alternate, each with its own
    optimizer. exact, finite_difference: the loss is evaluated after the lower steps of a round and differentiated
    through them; these are plain SGD steps, without decay and clipping, and are kept afterwards."""
    lower_optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: without momentum; required for differentiating through the lower steps."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Global: over all processes."""
    lower_learning_rate: Rate | None = None
    """None: as in the released script: lora 1e-4, dreambooth and dreambooth_lora 5e-6, textual_inversion 5e-4."""
    upper_learning_rate: Rate | None = None
    """None: as in the released script: lora 1e-5 (its argument parser's default is 1e-6), dreambooth and
    dreambooth_lora 2e-5, textual_inversion 1e-6."""
    upper_parameters: Literal["attention", "cross_attention", "cross_attention_kv"] = "attention"
    """The released name filter selects self- and cross-attention, although its comments say cross-attention."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 4
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapter; None: equal to the rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    vectors: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of embeddings of the new word (textual_inversion)."""
    begin_as: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """The word that the new word is initialized from; None: the concept's own word (its first token)."""
    templates: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Prompts with {} for the new word; None: Textual Inversion's prompts for objects or styles."""
    prior_weight: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of the loss on class images at the lower level alone. The released scripts do not use it; their code would
    add it at the upper level too, with the same negative sign as the concept's loss (`defend_dreambooth.py`)."""
    prior_images: Annotated[int, Field(ge=1, le=10_000)] = 200
    """Class images per concept, used if `prior_weight` is above zero; the default is DreamBooth's."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Limit of the gradient norm on both levels. None: by profile (paper: none; released: 1.0, but none with
    textual_inversion)."""
    flip: bool = True
    retain: Retain | None = optional()
    """A bound on the loss on what must stay; None: no bound. Not in the paper."""

    def __post_init__(self) -> None:
        """Reject invalid combinations."""
        if self.hypergradient != "first_order" and (self.lower_optimizer != "sgd" or self.ascent_only):
            raise ValueError(
                f"hypergradient '{self.hypergradient}' differentiates the lower steps: add lower_optimizer: sgd (and "
                "no ascent_only)"
            )
        if self.prior_weight and (self.lower not in ("dreambooth", "dreambooth_lora") or self.ascent_only):
            raise ValueError("prior_weight belongs to the lower levels dreambooth and dreambooth_lora")

    @property
    def looks_ahead(self) -> bool:
        """Whether the upper gradient goes through the lower steps; otherwise the levels alternate."""
        return self.hypergradient != "first_order"

    def of_profile(self) -> dict[str, float | None]:
        """Return the rates of the lower level's released script, and the profile's clipping."""
        is_clipped = self.profile == "released" and self.lower != "textual_inversion"
        return {
            "lower_learning_rate": _LOWER_RATES[self.lower],
            "upper_learning_rate": _UPPER_RATES[self.lower],
            "clip_norm": 1.0 if is_clipped else None,
        }


class ImmaBase(Retaining):
    """Base class of IMMA and the baselines made from it."""

    threat_model = ThreatModel(changes=("unet.attention",))
    uses = frozenset({"targets", "preserved", "images", "seed"})
    can_shard = True
    Parameters = Parameters
    quick = {"rounds": 2, "batch_size": 2, "prior_images": 2}

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """A forward and a backward pass for each update of either level, and the passes of H v."""
        p = parameters
        lower = 0 if p.ascent_only else p.lower_steps * (2 if p.prior_weight else 1)
        again = {"first_order": 0, "exact": 4 / 3, "finite_difference": 2}[p.hypergradient]
        return p.rounds * p.batch_size * (lower * (1 + again) + 1) * 3.0 + super().unet_passes(p, targets)

    @classmethod
    def search_space(cls, parameters) -> Space:
        """Vary the rates of both levels, and which weights are immunized."""
        upper = around(parameters.chosen("upper_learning_rate"), 4.0)
        space: Space = {
            "upper_learning_rate": upper,
            "upper_parameters": Choice(("attention", "cross_attention", "cross_attention_kv")),
        }
        lower = (
            {} if parameters.ascent_only else {"lower_learning_rate": around(parameters.chosen("lower_learning_rate"))}
        )
        return {**space, **lower}

    @classmethod
    def rehearsed(cls, parameters) -> tuple[Parameters, int]:
        """One lower step before each upper one, if they alternate; a round of a look-ahead is one step."""
        parameters = with_few_rounds(parameters)
        if parameters.looks_ahead or parameters.ascent_only:
            return parameters, 2
        return replace(parameters, lower_steps=1), 4

    @classmethod
    def prior_images(cls, parameters) -> int:
        """The number of class images per target, if the lower level or the bound uses them: the larger of both."""
        return max(parameters.prior_images if parameters.prior_weight else 0, super().prior_images(parameters))

    @classmethod
    def check_compiled(cls, parameters) -> list[tuple[str, str]]:
        """Reject second derivatives."""
        return list(exact_when_compiled(parameters.hypergradient))

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Reject settings that do not work with several processes."""
        found = [*global_batch(parameters, sharding), *super().check_sharding(parameters, sharding)]
        mode = hypergradient_mode(parameters.hypergradient, sharding)
        if mode:
            found.append(mode)
        if parameters.lower == "textual_inversion" and not parameters.ascent_only:
            found.append(("lower", "textual_inversion runs in one process; set resources.workers to 1"))
        return found


@register("defense")
class Imma(ImmaBase):
    """IMMA: alternate descent of a simulated attack and ascent of the attention weights, on one concept."""

    name = "imma"
    version = 1
    max_targets = 1
    presets = {
        # for the embedded testbed: the longest delay that kept 0.9 of the utility (docs/presets.md)
        "testbed": {
            "rounds": 100,
            "batch_size": 8,
            "rank": 8,
            "lower_learning_rate": 2e-3,
            "upper_learning_rate": 2.5e-4,
            "upper_parameters": "cross_attention",
            "target_modules": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
            "clip_norm": 1.0,
        },
    }

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the immunized attention weights."""
        return immunize(model, targets, preserved, self.parameters, run)


def immunize(
    model: DiffusionModel,
    targets: Sequence[ProtectedConcept],
    preserved: Sequence[ProtectedConcept],
    p: Parameters,
    run: Run,
) -> Protection:
    """Return the immunized weights of S, trained on the images of all `targets` together."""
    from harness.training import bilevel, retention, sharding
    from harness.training.diffusion import mean_value
    from harness.training.loop import StepOver, train
    from harness.training.selection import select
    from harness.training.weights import Level

    clip_norm = p.chosen("clip_norm")
    upper = model.change(select(model.parameters(), p.upper_parameters))
    with _lower_level(model, targets, p, run) as (lower, concept):
        levels = {"upper": Level(tuple(upper), p.chosen("upper_learning_rate"), p.weight_decay, clip_norm)}
        if lower:
            momentum = {"adamw": None, "sgd": 0.0}[p.lower_optimizer]
            rate = p.chosen("lower_learning_rate")
            levels["lower"] = Level(tuple(lower), rate, p.weight_decay, clip_norm, momentum)
        weights = sharding.spread(model, {**upper, **lower}, levels, run)
        plan = list(_levels(p, len(concept)))
        rounds = list(accumulate((level == "upper" for level in plan), initial=0))  # done before each step
        unreleased = [name for name in lower if name not in upper]
        stays = retention.bound(p.retain, model, run, weights, (targets, preserved), list(upper), unreleased, p.rounds)

        def alternating(index: int) -> dict[str, Tensor]:
            level = plan[index]
            loss = concept.at(index, -1.0 if level == "upper" else 1.0, p.prior_weight if level == "lower" else 0.0)
            slope = weights.gradient(loss, levels[level].names)
            if level == "lower":
                weights.step(level, slope)
                return {"lower_loss": mean_value(loss)}
            weights.step(level, stays.bounded(slope, rounds[index]))
            return {"upper_loss": mean_value(loss), **stays.numbers()}

        def looking_ahead(index: int) -> dict[str, Tensor]:
            first = index * (p.lower_steps + 1)
            losses = [concept.at(first + k, 1.0, p.prior_weight) for k in range(p.lower_steps)]
            outer = concept.at(first + p.lower_steps, -1.0)
            names = list(dict.fromkeys([*upper, *lower]))
            ahead = bilevel.LookAhead(weights, names, list(lower), losses, levels["lower"].learning_rate)
            adapted = ahead.adapted()
            slope = stays.bounded(bilevel.hypergradient(ahead, adapted, outer, p.hypergradient), index)
            weights.settle(adapted.end)
            weights.step("upper", slope)
            return {"lower_loss": mean_value(losses[-1]), "upper_loss": mean_value(outer), **stays.numbers()}

        if p.looks_ahead:
            train(run, StepOver(looking_ahead, stays), p.rounds, "IMMA")
        else:
            train(run, StepOver(alternating, stays), len(plan), "IMMA")
        return Protection(tensors=weights.whole(list(upper)), curves=stays.curves())


@contextlib.contextmanager
def _lower_level(model, targets: Sequence[ProtectedConcept], p: Parameters, run):
    """Yield (the simulated attack's trained parameters by name, the loss of both levels); undo the attack on exit."""
    from harness.core.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
    from harness.training import lora
    from harness.training.concept_loss import ConceptLoss
    from harness.training.diffusion import encode_images
    from harness.training.token_embedding import LearnedWord

    images, captions = ([item for target in targets for item in getattr(target, of)] for of in ("images", "captions"))
    prior, prior_captions = (  # `retain` may ask for more
        [item for target in targets for item in getattr(target, of)[: p.prior_images]]
        for of in ("prior_images", "prior_captions")
    )
    options = {"batch_size": p.batch_size, "flip": p.flip, "seed": run.seed_for("noise")}
    if p.prior_weight:
        options["prior"] = encode_images(model, run, prior, prior_captions, flip=p.flip)
    if p.ascent_only or p.lower == "dreambooth":
        names = [] if p.ascent_only else select_unet(model)
        yield model.change(names), ConceptLoss(model, run, images, captions, **options)
    elif p.lower == "textual_inversion":
        kind, phrase = targets[0].kind, targets[0].phrase
        word = LearnedWord(model, p.begin_as or phrase, p.vectors)
        templates = p.templates or (OBJECT_TEMPLATES if kind == "object" else STYLE_TEMPLATES)
        loss = ConceptLoss(model, run, images, captions, text=word, templates=templates, **options)
        yield {"word": word.vectors}, loss
    else:
        loss = ConceptLoss(model, run, images, captions, **options)
        with lora.injected(
            model, rank=p.rank, alpha=p.alpha or p.rank, target_modules=p.target_modules, seed=run.seed_for("adapter")
        ) as adapter:
            yield adapter, loss


def select_unet(model) -> list[str]:
    """Return the names of all UNet weights."""
    from harness.training.selection import select

    return select(model.parameters(), "unet")


def _levels(p: Parameters, images: int) -> Iterator[Literal["lower", "upper"]]:
    """Yield the level of every step until `rounds` upper steps are done.

    The released loops of lora and textual_inversion alternate by the index within the epoch. With an epoch too short to
    reach the upper level, the released loop would never end; the index then continues over epochs here.
    """
    if p.ascent_only:
        yield from ["upper"] * p.rounds
        return
    batches = math.ceil(images / p.batch_size)
    within_epoch = p.profile == "released" and p.lower in ("lora", "textual_inversion") and batches > p.lower_steps
    done = index = 0
    while done < p.rounds:
        position = index % batches if within_epoch else index
        level = "lower" if position % (p.lower_steps + 1) < p.lower_steps else "upper"
        done += level == "upper"
        index += 1
        yield level
