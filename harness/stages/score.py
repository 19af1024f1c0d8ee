"""Scoring images against references: scores.json, one value a step and prompt, or a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import pictures
from harness.stages import features
from harness.stages.work import StageAtWork

if TYPE_CHECKING:
    from harness.contracts.metric import Metric


def score(s: StageAtWork) -> None:
    """Write one value a step and prompt, and what the metric says of itself."""
    metric = s.method("metric")
    references = _references(s, metric)[: s.stage.parameters.get("images")]
    descriptions = s.stage.parameters["descriptions"]
    values = []
    with s.run.ledger.phase("score"):
        for step, groups in _groups(s, len(descriptions), metric.compares_with):
            opened = [pictures.read(group) for group in groups]
            scored = metric.score(opened, references, descriptions, s.run.device)
            of_a_set = metric.scope == "set"
            if len(scored) != (1 if of_a_set else len(opened)):
                raise ValueError(f"{metric.name} gave {len(scored)} values for {len(opened)} prompts")
            for prompt, value in enumerate(scored):
                if not math.isfinite(value):
                    what = "the images" if of_a_set else f"'{descriptions[prompt]}'"
                    raise ValueError(f"{metric.name} is {value} for {what} at step {step}")
                values.append({"step": step, "prompt": None if of_a_set else prompt, "value": value})
    about = {
        "direction": metric.direction,
        "unit": metric.unit,
        "range": f"{metric.range[0]:g}..{metric.range[1]:g}",
        **metric.about(),
    }
    (s.folder / "scores.json").write_text(json.dumps({"about": about, "values": values}), encoding="utf-8")


def _references(s: StageAtWork, metric: Metric) -> Any:
    """Return what is compared with, as the metric takes it."""
    if metric.encoder is not None:
        return features.read(s.input("references", "features"), s.run.device)
    return pictures.read(s.files("references", metric.compares_with))


def _groups(s: StageAtWork, prompts: int, compared_with: str) -> list[tuple[int, list[list[Path]]]]:
    """Return (step, files by prompt) of what is to be scored: a sample, or real images.

    Those are of the attack split, or of the reference split where the attack's images are what is compared with.
    """
    if "images" in s.stage.inputs:
        split = "attack" if compared_with == "reference" else "reference"
        return [(0, [[file] for file in s.files("images", split)][:prompts])]
    folder = s.input("sample", "sample") / "images"
    return [
        (int(step.name.removeprefix("step_")), [sorted(step.glob(f"{p:03d}_*.png")) for p in range(prompts)])
        for step in sorted(folder.iterdir())
    ]
