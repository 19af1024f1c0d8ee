"""Scoring images against references: scores.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

from harness import pictures
from harness.stages.at_work import StageAtWork


def score(s: StageAtWork) -> None:
    """Write one value a step and prompt, and what the metric says of itself."""
    metric = s.method("metric")
    references = pictures.read(s.files("references", metric.compares_with)[: s.stage.parameters.get("images")])
    descriptions = s.stage.parameters["descriptions"]
    values = []
    with s.run.ledger.phase("score"):
        for step, groups in _groups(s, len(descriptions), metric.compares_with):
            opened = [pictures.read(group) for group in groups]
            scored = metric.score(opened, references, descriptions, s.run.device)
            if len(scored) != len(opened):
                raise ValueError(f"{metric.name} gave {len(scored)} values for {len(opened)} prompts")
            for prompt, value in enumerate(scored):
                if not math.isfinite(value):
                    raise ValueError(f"{metric.name} is {value} for '{descriptions[prompt]}' at step {step}")
                values.append({"step": step, "prompt": prompt, "value": value})
    about = {
        "direction": metric.direction,
        "unit": metric.unit,
        "range": f"{metric.range[0]:g}..{metric.range[1]:g}",
        **metric.about(),
    }
    (s.folder / "scores.json").write_text(json.dumps({"about": about, "values": values}), encoding="utf-8")


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
