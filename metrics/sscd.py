"""SSCD (Pizzi et al. 2022): is a drawn image a copy of one of the attack's training images?

The highest cosine of copy-detection descriptors with any training image; like `nearest_training_image`, it is reported
with the scores. The model is a local TorchScript file of Meta's release. Loading it executes its graph, but no pickled
Python, so use a trusted source (its licence forbids commercial use). For sscd_disc_mixup its authors count pairs above
0.75 as copies, with 90 % precision on DISC.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contracts.metric import Metric
from harness.core.registry import register
from metrics.encoders import by_prompt, encode_images, flat, library

if TYPE_CHECKING:
    import torch

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as the authors have it."""
HALVES = (0.5, 0.5, 0.5)
"""Mean and deviation in the code of Wen et al., which other works on memorization took over."""


@dataclass(frozen=True)
class Parameters:
    """The model, and its authors' preprocessing."""

    weights: str | None = None
    """A local TorchScript file, such as sscd_disc_mixup.torchscript.pt; required."""
    resize: Literal["small_edge", "square"] = "small_edge"
    """small_edge: resize the shorter side to `size` pixels, for images of equal aspect ratio; square: both sides."""
    size: Annotated[int, Field(ge=32, le=2048)] = 288
    """Pixels; for square the authors use 320."""
    crop: Annotated[int, Field(ge=32, le=2048)] | None = None
    """Side of a square cut from the centre afterwards, in pixels; None: nothing is cut."""
    normalization: Literal["imagenet", "halves"] = "imagenet"
    """Mean and deviation: ImageNet's, or 0.5 and 0.5."""

    def __post_init__(self) -> None:
        """Reject a cut that is larger than the image."""
        if self.crop is not None and self.crop > self.size:
            raise ValueError(f"crop {self.crop} is larger than size {self.size}")


@register("metric")
class Sscd(Metric):
    """Cosine between copy-detection features of a generated image and the nearest training image of the attack."""

    name = "sscd"
    version = 2  # 2: `crop` and `normalization`; values of the other settings are as before
    direction = "none"
    compares_with = "attack"
    unit = "cosine"
    range = (-1.0, 1.0)
    encoder = "sscd@2"
    encoder_parameters = ("weights", "resize", "size", "crop", "normalization")
    Parameters = Parameters
    presets = {
        "square": {"resize": "square", "size": 320},  # its README, "skew_320"
        # Wen et al. (ICLR 2024), `measure_SSCD_similarity`; SAIL, bright ending and GUARD took it over
        "wen": {"resize": "small_edge", "size": 256, "crop": 224, "normalization": "halves"},
    }

    @classmethod
    def files(cls, parameters):
        return {} if parameters.weights is None else {"weights": Path(parameters.weights)}

    @classmethod
    def check_concept(cls, parameters, concept, drawn) -> Iterable[tuple[str, str]]:
        """Require a local file, since no download exists."""
        if parameters.weights is None:
            yield "weights", "is missing; give the path of a TorchScript file, such as sscd_disc_mixup.torchscript.pt"

    def about(self):
        p = self.parameters
        side = f"{p.size}x{p.size}" if p.resize == "square" else f"small edge {p.size}"
        cut = f", centre of {p.crop}" if p.crop else ""
        scaled = "" if p.normalization == "imagenet" else ", mean and deviation 0.5"
        return {
            "backbone": Path(p.weights).name,
            "preprocessing": f"{side}, bilinear{cut}{scaled}",
            "library": library("torch"),
        }

    def encode(self, images, device):
        """Return unit vectors; images are encoded one by one, since their sizes may differ."""
        import torch
        from torchvision import transforms

        p = self.parameters
        mean, deviation = (MEAN, DEVIATION) if p.normalization == "imagenet" else (HALVES, HALVES)
        transform = transforms.Compose(
            [
                transforms.Resize([p.size, p.size] if p.resize == "square" else p.size),
                *([transforms.CenterCrop(p.crop)] if p.crop else []),
                transforms.ToTensor(),
                transforms.Normalize(mean, deviation),
            ]
        )
        model = script(p.weights, device)
        return torch.cat([encode_images(model, transform, [image], device) for image in images])

    def score(self, images, references, descriptions, device):
        """Return, for each prompt, the mean over its images of the cosine with the nearest training image."""
        return by_prompt((self.encode(flat(images), device) @ references.T).max(dim=1).values, images)


@lru_cache(maxsize=1)
def script(weights: str, device: torch.device):
    """Return the model of a TorchScript file, loaded once."""
    import torch

    return torch.jit.load(weights, map_location=device).eval()
