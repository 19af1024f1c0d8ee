"""Evaluation images at every requested step: images/<step>/<prompt>_<image>.png."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts.hooks import make_hooks
from harness.contracts.stage import StageKind
from harness.contracts.state import ModelState
from harness.core.described import optional
from harness.core.finite import NothingDrawn, described, flat_among, flat_colour
from harness.core.registry import register
from harness.core.sampling import Sampling
from harness.stages.work import StageAtWork, class_of
from harness.store.layout import CHECKPOINTS, step_folder

if TYPE_CHECKING:
    from harness.contracts.protection import Protection
    from harness.core.identity import Input
    from harness.model.pipeline import DiffusionModel


@dataclass(frozen=True)
class SampleParameters:
    """Prompts and sampling, the steps of an adaptation to draw at, and an adaptive attacker's differences."""

    prompts: tuple[str, ...]
    steps: tuple[int, ...]  # (0,): before any adaptation
    sampling: Sampling
    restore: tuple[str, ...] | None = optional()  # components reset to their state before the defense
    attacker: str | None = optional()  # "adaptive": the publisher's hooks are left out; None: honest
    rounded_to: str | None = optional()  # what the released weights are rounded to before they are adapted or drawn by


@register("stage")
class Sample(StageKind):
    """Draw images from a released model, or from an adapted one along its trajectory."""

    name = "sample"
    version = 1
    after = ("erase", "immunize", "adapt")
    per_trial = True
    compiles = True
    Parameters = SampleParameters

    @classmethod
    def prompts(cls, parameters: SampleParameters) -> Sequence[str]:
        """Return the prompts as used for drawing: each attack may have its own words for the concept."""
        return parameters.prompts

    def do(self, parameters: SampleParameters, work: StageAtWork) -> None:
        """Draw the images; after a kill, continue with the remaining steps."""
        from harness.model.sampling import sample

        settings = parameters.sampling
        model, protection = work.state()
        hooks = sampling_hooks(protection, parameters.attacker or "honest")
        attack, checkpoints = None, None
        if "adapt" in work.stage.inputs:
            record = work.store.record("adapt", work.stage.inputs["adapt"].key)
            attack = class_of("attack", record["identity"]["component"])(None)
            checkpoints = work.input("adapt") / CHECKPOINTS
        saved = work.run.folder / "images"
        saved.mkdir(exist_ok=True)
        total = len(parameters.steps) * len(parameters.prompts) * settings.images_per_prompt
        done = flat = 0
        for step in parameters.steps:
            final, temporary = saved / step_folder(step), saved / f".{step_folder(step)}"
            if final.is_dir():  # drawn before a kill
                done += len(list(final.iterdir()))
                flat += len(flat_among(final.iterdir()))
                continue
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            if checkpoints is not None:
                attack.load(model, checkpoints / step_folder(step))
            try:
                with work.run.ledger.phase("sample"):
                    for prompt, index, image in sample(
                        model, work.run, parameters.prompts, settings,
                        images_per_prompt=settings.images_per_prompt, seed=work.run.seed, hooks=hooks,
                    ):  # fmt: skip
                        image.save(temporary / f"{prompt:03d}_{index:03d}.png")
                        done += 1
                        work.run.report(done, total)
            finally:
                if checkpoints is not None:
                    attack.unload(model)
            colours = flat_among(sorted(temporary.iterdir()))
            if colours and len(colours) == len(parameters.prompts) * settings.images_per_prompt:
                _require_result(work, model, hooks, parameters, step, colours)
            flat += len(colours)
            temporary.rename(final)
        if flat:
            work.run.notify(f"{flat} of {total} images are one flat colour")
            work.run.ledger.numbers["flat_images"] = flat
        shutil.copytree(saved, work.folder / "images", copy_function=os.link)


def _require_result(
    work: StageAtWork, model: DiffusionModel, hooks: Sequence[Any], parameters: SampleParameters, step: int, colours
) -> None:
    """Raise NothingDrawn unless flat images are what a defense did: the defended model draws nothing without an attack.

    `model` is the released model. Only after a step whose images are all flat: the releases' images are drawn again,
    one a prompt.
    """
    from harness.model.sampling import sample

    count = len(colours)
    what = f"all {count} images at step {step} are one flat colour, {described(colours)}"
    if not any(_defends(work, layer) for layer in ModelState.read(work.stage.inputs).layers):
        cause = "the attack's training diverged" if step else "the undefended model draws nothing"
        advice = "lower learning_rate" if step else "check its VAE and scheduler_config.json, and 'sampling'"
        raise NothingDrawn(f"{what}: {cause}; {advice}")
    if step:
        settings, seed = parameters.sampling, work.run.seed
        drawn = sample(model, work.run, parameters.prompts, settings, images_per_prompt=1, seed=seed, hooks=hooks)
        if any(flat_colour(image) is None for _, _, image in drawn):
            raise NothingDrawn(
                f"{what}: the attack's training diverged (before it the defended model draws others); "
                "lower learning_rate"
            )
    work.run.notify(f"{what}: the defended model draws nothing, also without an attack")


def _defends(work: StageAtWork, layer: Input) -> bool:
    """Return whether a layer is a defense that released anything."""
    from harness.contracts.protection import Protection

    if layer.kind != "immunize":
        return False
    found = Protection.load(work.store.path(layer.kind, layer.key))
    return bool(found.tensors or found.components or found.frozen or found.adaptation or found.sampling)


def sampling_hooks(protection: Protection, attacker: str) -> list[Any]:
    """Return the publisher's hooks for drawing images; none for an adaptive attacker, who has the weights."""
    return make_hooks("sampling_hook", protection.sampling) if attacker == "honest" else []


def refuse_sampling_hooks(protection: Protection, who: str) -> None:
    """Raise ValueError if a state has sampling hooks; `who` makes predictions without drawing and would ignore them."""
    if protection.sampling:
        names = ", ".join(spec.name for spec in protection.sampling)
        raise ValueError(f"{who} does not draw, so it cannot run sampling hooks ({names}); use a state without them")
