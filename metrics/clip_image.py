"""CLIP image similarity: cosine of CLIP image features of generated and reference images, over all pairs.

As in IMMA's scorer (OpenAI ViT-B/32), without its defects: images are not shrunk to 64x64 first, and each is
preprocessed as its backbone was trained (papers' facts: imma.md, traps T1 and T2).
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.registry import register
from metrics.base import Metric
from metrics.encoders import clip, fetched, library, local_files, mean_similarity_by_prompt


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

    def score(self, images, references, descriptions, device):
        """Return the mean cosine of each prompt's images with all references."""
        model, transform, _ = clip(self.parameters.backbone, self.parameters.pretrained, device)
        return mean_similarity_by_prompt(model.encode_image, transform, images, references, device)
