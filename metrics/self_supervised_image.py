"""Self-supervised image similarity (DINO): cosine of features trained without text, over all pairs.

IMMA uses DINO v1 ViT-S/16; its scorer normalises by CLIP's mean and deviation (imma.md, trap T2). Here each backbone
gets its own preprocessing.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.contracts.metric import Metric
from harness.core.registry import register
from metrics.encoders import by_prompt, encode_images, fetched, flat, library, local_files, vision


@dataclass(frozen=True)
class Parameters:
    """Default: the backbone of IMMA's tables."""

    backbone: str = "vit_small_patch16_224.dino"
    """A timm model, "hf-hub:…", "local-dir:…", or "testbed"."""


@register("metric")
class SelfSupervisedImage(Metric):
    """Cosine between self-supervised features of generated and reference images, averaged over all pairs."""

    name = "self_supervised_image"
    version = 1
    direction = "higher"
    unit = "cosine"
    range = (-1.0, 1.0)
    encoder = "timm@1"
    encoder_parameters = ("backbone",)
    Parameters = Parameters
    presets = {
        "dinov2": {"backbone": "vit_small_patch14_dinov2.lvd142m"},  # Oquab et al. 2023, ViT-S/14, at 518 pixels
        "testbed": {"backbone": "testbed"},
    }

    @classmethod
    def files(cls, parameters):
        return local_files(parameters.backbone, "vit")

    @classmethod
    def fetches(cls, parameters):
        return fetched(parameters.backbone, "vit")

    def about(self):
        return {
            "backbone": self.parameters.backbone,
            "preprocessing": "the backbone's own",
            "library": library("timm"),
        }

    def encode(self, images, device):
        """Return unit vectors."""
        model, transform = vision(self.parameters.backbone, device)
        return encode_images(model, transform, images, device)

    def score(self, images, references, descriptions, device):
        """Return the mean cosine of each prompt's images with all references, over all pairs."""
        return by_prompt((self.encode(flat(images), device) @ references.T).double().mean(dim=1), images)
