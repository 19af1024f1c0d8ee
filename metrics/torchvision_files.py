"""Weights of torchvision's networks: a local safetensors file, or torchvision's download.

Downloads are pickled files: they are read with `weights_only`, which executes no code, and checked against the hash in
their names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.fetched import Fetched, Unlocated
from harness.core.web_file import WebFile

if TYPE_CHECKING:
    from torch import Tensor

ADDRESS = "https://download.pytorch.org/models/"
"""Where torchvision keeps its weights."""
KNOWN = {
    "AlexNet_Weights.IMAGENET1K_V1": ("alexnet-owt-7be5be79.pth", 244_408_911),
    "VGG16_Weights.IMAGENET1K_V1": ("vgg16-397923af.pth", 553_433_881),
    "SqueezeNet1_1_Weights.IMAGENET1K_V1": ("squeezenet1_1-b8a52dc0.pth", 4_958_839),
    "ResNet50_Weights.IMAGENET1K_V1": ("resnet50-0676ba61.pth", 102_530_333),
    "ResNet50_Weights.IMAGENET1K_V2": ("resnet50-11ad3fa6.pth", 102_540_417),
}
"""File and approximate bytes by torchvision's name; reading torchvision's own table needs torch."""


def hub_file(name: str) -> Path:
    """Return the path of a file in torch.hub's cache, by its documented layout."""
    cache = os.getenv("XDG_CACHE_HOME", "~/.cache")
    home = os.getenv("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints" / name


def fetched(name: str, weights: str | None) -> list[Fetched]:
    """Return torchvision's downloads for the weights of a name; [] for a local file."""
    if weights is not None:
        return []
    if name not in KNOWN:
        return [Unlocated(f"torchvision's {name}")]
    file, size = KNOWN[name]
    return [WebFile(f"torchvision's {name}", size=size, url=ADDRESS + file, file=hub_file(file))]


def local_files(weights: str | None) -> dict[str, Path]:
    """Return the parameter `weights` if it names a file."""
    return {} if weights is None else {"weights": Path(weights)}


def check_safetensors(weights: str | None) -> None:
    """Raise ValueError for a file of another format, since loading it may execute code."""
    if weights is not None and not weights.endswith(".safetensors"):
        raise ValueError(f"weights must be a .safetensors file (got '{weights}')")


def state_dict(name: str, weights: str | None) -> dict[str, Tensor]:
    """Return the tensors of a local file, or of torchvision's weights `name`."""
    if weights is not None:
        from safetensors.torch import load_file

        return load_file(weights)
    from torchvision.models import get_weight

    return get_weight(name).get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
