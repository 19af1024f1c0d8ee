"""Features of references: made once for every metric and stage that compares with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.contracts.stage import StageKind
from harness.core import pictures
from harness.core.described import Described
from harness.core.registry import register
from harness.stages.work import StageAtWork, made

if TYPE_CHECKING:
    from torch import Tensor

FILE = "features.safetensors"
FEATURES = "features"
"""The name of the tensor in the file."""


@dataclass(frozen=True)
class FeaturesParameters:
    """The encoder's parameters, and the images that it encodes."""

    parameters: Described  # those of the metric that its `encode` depends on
    split: str


@register("stage")
class Features(StageKind):
    """Encode the references of a concept."""

    name = "features"
    version = 1
    after = ("images",)
    Parameters = FeaturesParameters

    def do(self, parameters: FeaturesParameters, work: StageAtWork) -> None:
        """Encode the images of a split by the metric that asked: any of the same encoder gives the same."""
        from safetensors.torch import save_file

        asking, local = work.stage.local["metric"], work.stage.local["parameters"]
        metric = made("metric", asking["component"], asking["parameters"], local)
        with work.run.ledger.phase("encode"):
            features = metric.encode(pictures.read(work.files("images", parameters.split)), work.run.device)
        save_file({FEATURES: features.detach().to("cpu").contiguous()}, work.folder / FILE, {"format": "pt"})


def read(folder: Path, device) -> Tensor:
    """Return the features in the folder of a stage: [images, width]."""
    from safetensors.torch import load_file

    return load_file(folder / FILE)[FEATURES].to(device)
