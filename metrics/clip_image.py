"""CLIP image similarity: cosine of CLIP image features of generated and reference images, over all pairs.

As in IMMA's scorer (OpenAI ViT-B/32), without its defects: images are not first reduced to 64x64, and they are
preprocessed as in the backbone's training (papers' facts: imma.md, traps T1 and T2).
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.core.registry import register
from metrics.encoders import by_prompt, flat
from metrics.open_clip_metric import OpenClipMetric
from metrics.open_clip_tables import check_activation


@dataclass(frozen=True)
class Parameters:
    """Default: the backbone of IMMA's tables."""

    backbone: str = "ViT-B-32-quickgelu"
    """An open_clip model name, "hf-hub:…", "local-dir:…", or "testbed"."""
    pretrained: str | None = "openai"
    """An open_clip weight tag or a local safetensors file."""

    def __post_init__(self) -> None:
        """Reject weights that the backbone's activation does not fit."""
        check_activation(self.backbone, self.pretrained)


@register("metric")
class ClipImage(OpenClipMetric):
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

    def score(self, images, references, descriptions, device):
        """Return the mean cosine of each prompt's images with all references, over all pairs (IMMA's code)."""
        return by_prompt((self.encode(flat(images), device) @ references.T).double().mean(dim=1), images)
