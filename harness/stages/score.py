"""Score images against references: scores.json, one value per step and prompt, or per step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.stage import StageKind
from harness.core import pictures
from harness.core.described import Described, optional
from harness.core.registry import register
from harness.stages import features
from harness.stages.work import StageAtWork
from harness.store.layout import SCORES

if TYPE_CHECKING:
    from harness.contracts.metric import Metric


@dataclass(frozen=True)
class ScoreParameters:
    """A metric's own parameters, and the requested content of the images."""

    parameters: Described
    descriptions: tuple[str, ...]  # one per prompt, in plain words
    images: int | None = optional()  # number of references used in training; None: all


@register("stage")
class Score(StageKind):
    """Score images with one metric."""

    name = "score"
    version = 1
    method_kind = "metric"
    after = ("images", "sample", "features")
    Parameters = ScoreParameters

    def do(self, parameters: ScoreParameters, work: StageAtWork) -> None:
        """Write one value per step and prompt, and the metric's description of itself."""
        metric = work.method()
        references = _references(work, metric)[: parameters.images]
        values = []
        with work.run.ledger.phase("score"):
            for step, groups in _groups(work, len(parameters.descriptions), metric.compares_with):
                opened = [pictures.read(group) for group in groups]
                scored = metric.score(opened, references, parameters.descriptions, work.run.device)
                values += _checked(metric, scored, step, parameters.descriptions[: len(opened)])
        about = {
            "direction": metric.direction,
            "unit": metric.unit,
            "range": f"{metric.range[0]:g}..{metric.range[1]:g}",
            **metric.about(),
        }
        (work.folder / SCORES).write_text(json.dumps({"about": about, "values": values}), encoding="utf-8")


def _checked(
    metric: Metric, scored: list[float], step: int, descriptions: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return the values of a step. Raises ValueError for a wrong number of them, or one that is not finite."""
    of_a_set = metric.scope == "set"
    if len(scored) != (1 if of_a_set else len(descriptions)):
        raise ValueError(f"{metric.name} gave {len(scored)} values for {len(descriptions)} prompts")
    for prompt, value in enumerate(scored):
        if not math.isfinite(value):
            what = "the images" if of_a_set else f"'{descriptions[prompt]}'"
            raise ValueError(f"{metric.name} is {value} for {what} at step {step}")
    return [
        {"step": step, "prompt": None if of_a_set else prompt, "value": value} for prompt, value in enumerate(scored)
    ]


def _references(work: StageAtWork, metric: Metric) -> Any:
    """Return the references, in the form that the metric takes."""
    if metric.encoder is not None:
        return features.read(work.input("references"), work.run.device)
    return pictures.read(work.files("references", metric.compares_with))


def _groups(work: StageAtWork, prompts: int, compared_with: str) -> list[tuple[int, list[list[Path]]]]:
    """Return (step, files by prompt) of the images to score: a sample, or real images.

    Real images are from the attack split, or from the reference split if the attack's images are the references.
    """
    if "images" in work.stage.inputs:
        split = "attack" if compared_with == "reference" else "reference"
        return [(0, [[file] for file in work.files("images", split)][:prompts])]
    folder = work.input("sample") / "images"
    return [
        (int(step.name.removeprefix("step_")), [sorted(step.glob(f"{p:03d}_*.png")) for p in range(prompts)])
        for step in sorted(folder.iterdir())
    ]
