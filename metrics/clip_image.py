"""CLIP image similarity: cosine of CLIP image features of generated and reference images, over all pairs.

As in IMMA's scorer (OpenAI ViT-B/32), without its defects: images are not shrunk to 64x64 first, and each is
preprocessed as its backbone was trained (papers' facts: imma.md, traps T1 and T2).
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.registry import register
from metrics.base import Metric
from metrics.encoders import by_prompt, clip, encode_images, fetched, flat, library, local_files


@dataclass(frozen=True)
class Parameters:
    """Defaults: the backbone of IMMA's tables."""

    backbone: str = "ViT-B-32-quickgelu"
    """An open_clip model name, "hf-hub:…", "local-dir:…", or "testbed"."""
    pretrained: str | None = "openai"
    """An open_clip weight tag or a local safetensors file."""


@register("metric")
class ClipImage(Metric):
    """Cosine between CLIP features of generated and reference images, averaged over all pairs."""

    name = "clip_image"
    version = 1
    direction = "higher"
    unit = "cosine"
    range = (-1.0, 1.0)
    encoder = "open_clip@1"
    encoder_parameters = ("backbone", "pretrained")
    Parameters = Parameters
    presets = {"testbed": {"backbone": "testbed", "pretrained": None}}

    @classmethod
    def files(cls, parameters):
        return local_files(parameters.backbone, "clip", parameters.pretrained)

    @classmethod
    def fetches(cls, parameters):
        return fetched(parameters.backbone, "clip", parameters.pretrained)

    def about(self):
        p = self.parameters
        return {
            "backbone": f"{p.backbone}/{p.pretrained}" if p.pretrained else p.backbone,
            "preprocessing": "the backbone's own",
            "library": library("open_clip_torch"),
        }

    def encode(self, images, device):
        """Return unit vectors."""
        model, transform, _ = clip(self.parameters.backbone, self.parameters.pretrained, device)
        return encode_images(model.encode_image, transform, images, device)

    def score(self, images, references, descriptions, device):
        """Return the mean cosine of each prompt's images with all references, over all pairs (IMMA's code)."""
        return by_prompt((self.encode(flat(images), device) @ references.T).double().mean(dim=1), images)
