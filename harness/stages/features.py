"""Features of references, computed once for all metrics and stages that use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.contracts.stage import StageKind
from harness.core import pictures, registry
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
    """The parameters of the encoder, and the split that it encodes."""

    parameters: Described  # the metric's parameters that its `encode` depends on
    split: str


@register("stage")
class Features(StageKind):
    """Encode the references of a concept."""

    name = "features"
    version = 1
    after = ("images",)
    Parameters = FeaturesParameters

    def do(self, parameters: FeaturesParameters, work: StageAtWork) -> None:
        """Encode the images of a split by the requesting metric; metrics with the same encoder give the same."""
        from safetensors.torch import save_file

        asking, local = work.stage.local["metric"], work.stage.local["parameters"]
        metric = made("metric", asking["component"], asking["parameters"], local)
        if registry.encoder(type(metric)) != work.stage.component:
            raise ValueError(f"the encoder of {metric.name!r} is not {work.stage.component}; run the command again")
        with work.run.ledger.phase("encode"):
            features = metric.encode(pictures.read(work.files("images", parameters.split)), work.run.device)
        save_file({FEATURES: features.detach().to("cpu").contiguous()}, work.folder / FILE, {"format": "pt"})


def read(folder: Path, device) -> Tensor:
    """Return the features in a stage's folder: [images, width]."""
    from safetensors.torch import load_file

    return load_file(folder / FILE)[FEATURES].to(device)
