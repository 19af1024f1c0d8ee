"""The training images of prompts, in order, as references for metrics: reference/<number>.png."""

from __future__ import annotations

from dataclasses import dataclass

from harness.contracts.stage import StageKind
from harness.core.registry import register
from harness.stages import pairs
from harness.stages.work import StageAtWork

SPLIT = "reference"
"""The one folder of images."""


@dataclass(frozen=True)
class OriginalsParameters:
    """How many images; what they are is in the stage's `data`, where they are in its `local`."""

    count: int


@register("stage")
class Originals(StageKind):
    """Copy the training images of prompts."""

    name = "originals"
    version = 1
    Parameters = OriginalsParameters

    def do(self, parameters: OriginalsParameters, work: StageAtWork) -> None:
        """Fill the folder."""
        folder = work.folder / SPLIT
        folder.mkdir()
        for index in range(parameters.count):
            pairs.image(work.stage.local["pairs"], index).save(folder / f"{index:05d}.png")
            work.run.report(index + 1, parameters.count)
