"""CLIP text alignment: cosine between generated images and the description of the requested content, times 100.

The scale follows torchmetrics' CLIPScore, but a prompt's value may be negative: torchmetrics replaces a mean below
zero by zero, which hides its size, and takes one mean over all given pairs. The description has plain words where the
prompt has an attacker's identifier.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.core.registry import register
from metrics.encoders import clip, encode_images
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
class ClipText(OpenClipMetric):
    """Cosine between CLIP features of generated images and their description, times 100."""

    name = "clip_text"
    version = 1
    direction = "higher"
    unit = "100 x cosine"
    range = (-100.0, 100.0)
    Parameters = Parameters
    presets = {
        "testbed": {"backbone": "testbed", "pretrained": None},
        "wen": {"backbone": "ViT-g-14", "pretrained": "laion2b_s12b_b42k"},  # Wen et al. (ICLR 2024); MemBench
        "sail": {"backbone": "ViT-H-14", "pretrained": "laion2b_s32b_b79k"},  # Jeon et al. (ICML 2025)
    }

    def score(self, images, references, descriptions, device):
        """Return the mean alignment of each prompt's images with its description."""
        import torch

        model, transform, tokenize = clip(self.parameters.backbone, self.parameters.pretrained, device)
        with torch.no_grad():
            texts = model.encode_text(tokenize(list(descriptions)).to(device)).float()
        texts = torch.nn.functional.normalize(texts, dim=-1)
        values = []
        for text, group in zip(texts, images, strict=True):
            drawn = encode_images(model.encode_image, transform, group, device)
            values.append(100.0 * float((drawn @ text).double().mean()))
        return values
