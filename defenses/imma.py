"""IMMA: immunize a model against adaptation to one concept.

Zheng & Yeh, "IMMA: Immunizing Text-to-Image Models against Malicious Adaptation", ECCV 2024 (arXiv 2311.18815):

    max_{theta in S} L(x_I, c; theta, phi*)    s.t.   phi* = argmin_phi L(x_A, c; theta, phi)

with L the denoising loss, phi what the attack trains and S the attention projections of the UNet. Both levels
alternate; phi goes on from its last value (Algorithm 1, as restated by a third party: the paper's own text could not be
read).

Lower levels (phi): `lora` and `dreambooth_lora`, an adapter on the UNet; `dreambooth`, the whole UNet, of which only S
is released and the rest is thrown away; `textual_inversion`, the embedding of one new word. The released scripts' rates
are each one's defaults. DreamBooth's class images may be weighed in at the lower level (`prior_weight`).

Profiles
    paper     each round draws a batch for each step: the lower steps, then one upper step; no clipping.
    released  one batch a step; the index decides the level. With lora and textual_inversion it counts *within an
              epoch*, so that an epoch of an odd number of batches takes two lower steps in a row; with the others it
              counts on. Gradients are clipped to norm 1 on both levels, but not with textual_inversion.

Beyond both: `hypergradient`. Papers and code treat phi* as a constant (first_order). With `exact` or
`finite_difference` the lower steps of a round are SGD steps, and the upper gradient is that of the loss after them as a
function of the weights before: it includes how the weights influence the attack. `ascent_only` drops the lower level
(the code's `--max`), an ablation of the lower level.

Differences from earlier code of version 1: `lower_optimizer: sgd` with first_order takes SGD steps in the levels' usual
turns, with decay and clipping; it used to look ahead. The version stays, since no bundled suite or preset asks for it.

Differences from the paper: the optimizer of either level is not known from the text; both use AdamW as the code does.
Differences from the released code: gradients are computed only where a level needs them (the code accumulates them in
the whole UNet and never clears them); latents and text embeddings are encoded once; images are resized by LANCZOS and
cropped at the centre (there: bilinear, random crop by default); `--reinitialize_lora`, which has no effect
there, does not exist; DB+LoRA, which cannot run there, runs; a last, smaller batch of an epoch is filled from the next.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.protection import Protection, ThreatModel
from harness.core.profiles import ByProfile
from harness.core.registry import register
from harness.core.sharding import global_batch, hypergradient_mode

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run

Rate = Annotated[float, Field(gt=0, le=10)]
_LOWER_RATES = {"lora": 1e-4, "dreambooth": 5e-6, "dreambooth_lora": 5e-6, "textual_inversion": 5e-4}
_UPPER_RATES = {"lora": 1e-5, "dreambooth": 2e-5, "dreambooth_lora": 2e-5, "textual_inversion": 1e-6}


@dataclass(frozen=True)
class Parameters(ByProfile):
    """Defaults: the released scripts'; what the paper states could not be read (papers' facts: "not found")."""

    profile: Literal["paper", "released"] = "paper"
    lower: Literal["lora", "dreambooth", "dreambooth_lora", "textual_inversion"] = "lora"
    """Which adaptation the lower level simulates."""
    ascent_only: bool = False
    """No lower level: gradient ascent on the concept's loss."""
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Upper updates; the released run takes 1000 iterations, half of them upper."""
    lower_steps: Annotated[int, Field(ge=1, le=100)] = 1
    """Lower updates for each upper one."""
    hypergradient: Literal["first_order", "exact", "finite_difference"] = "first_order"
    """How the upper gradient goes through the lower steps, and so how the levels take turns. first_order: not at all;
    each level's optimizer takes its steps. exact, finite_difference: the loss is evaluated after the lower steps
    of a round and differentiated through them; they are plain SGD steps, without decay and clipping, and then stay."""
    lower_optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: without momentum; the only one whose steps are differentiated."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Global: over all processes."""
    lower_learning_rate: Rate | None = None
    """None: the released script's: lora 1e-4, dreambooth and dreambooth_lora 5e-6, textual_inversion 5e-4."""
    upper_learning_rate: Rate | None = None
    """None: the released script's: lora 1e-5 (its argument parser's default is 1e-6), dreambooth and dreambooth_lora
    2e-5, textual_inversion 1e-6."""
    upper_parameters: Literal["attention", "cross_attention", "cross_attention_kv"] = "attention"
    """The released name filter takes both self- and cross-attention, although its comments name cross-attention."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 4
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapter; None: equal to the rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    vectors: Annotated[int, Field(ge=1, le=64)] = 1
    """Embeddings of the new word (textual_inversion)."""
    begin_as: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """The word that the new one begins as; None: the concept's own (its first token)."""
    templates: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Prompts with {} for the new word; None: Textual Inversion's for objects or styles."""
    prior_weight: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Of the loss on class images at the lower level; the released scripts leave it off."""
    prior_images: Annotated[int, Field(ge=1, le=10_000)] = 200
    """Class images for each concept, where they are weighed; DreamBooth's number."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """On both levels. None: the profile's (paper: no clipping; released: 1.0, textual_inversion none)."""
    flip: bool = True

    def __post_init__(self) -> None:
        """Refuse parameters that do not fit together."""
        if self.hypergradient != "first_order" and (self.lower_optimizer != "sgd" or self.ascent_only):
            raise ValueError(
                f"hypergradient '{self.hypergradient}' differentiates the lower steps: add lower_optimizer: sgd (and "
                "no ascent_only)"
            )
        if self.prior_weight and (self.lower not in ("dreambooth", "dreambooth_lora") or self.ascent_only):
            raise ValueError("prior_weight belongs to the lower levels dreambooth and dreambooth_lora")

    @property
    def looks_ahead(self) -> bool:
        """Whether the upper gradient goes through the lower steps; without, the levels alternate."""
        return self.hypergradient != "first_order"

    def of_profile(self) -> dict[str, float | None]:
        """Return the rates of the lower level's own script, and the profile's clipping."""
        is_clipped = self.profile == "released" and self.lower != "textual_inversion"
        return {
            "lower_learning_rate": _LOWER_RATES[self.lower],
            "upper_learning_rate": _UPPER_RATES[self.lower],
            "clip_norm": 1.0 if is_clipped else None,
        }


class ImmaBase(Defense):
    """Common base class of IMMA and of the baselines made from it."""

    threat_model = ThreatModel(changes=("unet.attention",))
    uses = frozenset({"targets", "images", "seed"})
    can_shard = True
    Parameters = Parameters
    quick = {"rounds": 2, "batch_size": 2, "prior_images": 2}

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """A forward and a backward pass for each update of either level, and those of H v."""
        p = parameters
        lower = 0 if p.ascent_only else p.lower_steps * (2 if p.prior_weight else 1)
        again = {"first_order": 0, "exact": 4 / 3, "finite_difference": 2}[p.hypergradient]
        return p.rounds * p.batch_size * (lower * (1 + again) + 1) * 3.0

    @classmethod
    def prior_images(cls, parameters) -> int:
        """Class images for each target, when the lower level weighs them in."""
        return parameters.prior_images if parameters.prior_weight else 0

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Refuse settings that several processes cannot share."""
        found = list(global_batch(parameters, sharding))
        mode = hypergradient_mode(parameters.hypergradient, sharding)
        if mode:
            found.append(mode)
        if parameters.lower == "textual_inversion" and not parameters.ascent_only:
            found.append(("lower", "textual_inversion runs in one process; set resources.workers to 1"))
        return found


@register("defense")
class Imma(ImmaBase):
    """IMMA: descent of a simulated attack and ascent of the attention weights, in turn, on one concept."""

    name = "imma"
    version = 1
    max_targets = 1
    presets = {
        # for the embedded testbed: the greatest delay that kept 0.9 of the utility (docs/presets.md)
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
        return Protection(tensors=immunize(model, targets, self.parameters, run))


def immunize(model: DiffusionModel, targets: Sequence[ProtectedConcept], p: Parameters, run: Run) -> dict[str, Tensor]:
    """Return the immunized weights of S, trained on the images of all `targets` taken together."""
    from harness.training import bilevel, sharding
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

        def alternating(index: int) -> dict[str, float]:
            level = plan[index]
            loss = concept.at(index, -1.0 if level == "upper" else 1.0, p.prior_weight if level == "lower" else 0.0)
            weights.step(level, weights.gradient(loss, levels[level].names))
            return {f"{level}_loss": mean_value(loss)}

        def looking_ahead(index: int) -> dict[str, float]:
            first = index * (p.lower_steps + 1)
            losses = [concept.at(first + k, 1.0, p.prior_weight) for k in range(p.lower_steps)]
            outer = concept.at(first + p.lower_steps, -1.0)
            names = list(dict.fromkeys([*upper, *lower]))
            ahead = bilevel.LookAhead(weights, names, list(lower), losses, levels["lower"].learning_rate)
            adapted = ahead.adapted()
            slope = bilevel.hypergradient(ahead, adapted, outer, p.hypergradient)
            weights.settle(adapted.end)
            weights.step("upper", slope)
            return {"lower_loss": mean_value(losses[-1]), "upper_loss": mean_value(outer)}

        if p.looks_ahead:
            train(run, StepOver(looking_ahead, weights), p.rounds, "IMMA")
        else:
            train(run, StepOver(alternating, weights), len(plan), "IMMA")
        return weights.whole(list(upper))


@contextlib.contextmanager
def _lower_level(model, targets: Sequence[ProtectedConcept], p: Parameters, run):
    """Yield (what the simulated attack trains, by name; the loss that both levels share); undo it on leaving."""
    from harness.training import lora
    from harness.training.concept_loss import ConceptLoss
    from harness.training.diffusion import encode_images
    from harness.training.token_embedding import OBJECT_TEMPLATES, STYLE_TEMPLATES, LearnedWord

    images, captions, prior, prior_captions = (
        [item for target in targets for item in getattr(target, attribute)]
        for attribute in ("images", "captions", "prior_images", "prior_captions")
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
    """Return the names of all weights of the UNet."""
    from harness.training.selection import select

    return select(model.parameters(), "unet")


def _levels(p: Parameters, images: int) -> Iterator[Literal["lower", "upper"]]:
    """Yield the level of every step until `rounds` upper steps are done.

    The released loops of lora and textual_inversion alternate on the index within the epoch. An epoch too short to
    reach the upper level would never end there; we then count over epochs.
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
