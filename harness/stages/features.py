"""Features of references: made once for every metric and stage that compares with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.core import pictures
from harness.stages.work import StageAtWork

if TYPE_CHECKING:
    from torch import Tensor

FILE = "features.safetensors"
FEATURES = "features"
"""The name of the tensor in the file."""


def encode(s: StageAtWork) -> None:
    """Encode the images of a split."""
    from safetensors.torch import save_file

    metric = s.method("metric", s.stage.local["metric"], s.stage.local["parameters"])
    with s.run.ledger.phase("encode"):
        features = metric.encode(pictures.read(s.files("images", s.stage.parameters["split"])), s.run.device)
    save_file({FEATURES: features.detach().to("cpu").contiguous()}, s.folder / FILE, {"format": "pt"})


def read(folder: Path, device) -> Tensor:
    """Return what `encode` left in a stage's folder."""
    from safetensors.torch import load_file

    return load_file(folder / FILE)[FEATURES].to(device)
