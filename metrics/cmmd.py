"""CMMD (Jayasumana et al. 2024): squared MMD between CLIP features of drawn and reference images, times 1000.

Unit vectors of CLIP ViT-L/14 at 336 pixels, a Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)) with sigma 10, images
resized to the encoder's input (bicubic, no crop, no antialiasing). The released PyTorch code uses the biased estimate,
which includes the diagonal (papers' facts: pruned_bilevel.md, section 6). The default here is the unbiased estimate,
which does not grow with fewer images and may be negative. The preset `released` uses the biased one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from harness.core.registry import register
from metrics.encoders import clip, encode_images, flat
from metrics.open_clip_metric import OpenClipMetric

SCALE = 1000.0


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of the paper, except the estimate."""

    backbone: str = "ViT-L-14-336-quickgelu"
    """An open_clip model name, "hf-hub:…", "local-dir:…", or "testbed"."""
    pretrained: str | None = "openai"
    """An open_clip weight tag or a local safetensors file."""
    sigma: Annotated[float, Field(gt=0)] = 10.0
    """Width of the kernel."""
    estimate: Literal["unbiased", "biased"] = "unbiased"


@register("metric")
class Cmmd(OpenClipMetric):
    """Squared MMD between CLIP features of drawn images and references, times 1000."""

    name = "cmmd"
    version = 1
    direction = "lower"
    scope = "set"
    unit = "1000 x squared MMD"
    range = (-2 * SCALE, 2 * SCALE)
    encoder = "open_clip_squashed@1"
    encoder_parameters = ("backbone", "pretrained")
    Parameters = Parameters
    presets = {
        "released": {"estimate": "biased"},  # cmmd-pytorch
        "testbed": {"backbone": "testbed", "pretrained": None},
    }

    @classmethod
    def check_concept(cls, parameters, concept, drawn) -> Iterable[tuple[str, str]]:
        """Require two images on each side for the unbiased estimate; the attack split's images are scored too."""
        counts = {
            "a step": drawn,
            "the attack split": concept.count("attack"),
            "the reference split": concept.count("reference"),
        }
        few = next((what for what, count in counts.items() if count < 2), None)
        if few and parameters.estimate == "unbiased":
            yield "", f"{cls.name} compares distributions, but {few} has one image; give two or more"

    def about(self):
        p = self.parameters
        return {**super().about(), "preprocessing": f"bicubic without crop; {p.estimate}, sigma {p.sigma:g}"}

    def encode(self, images, device):
        """Return unit vectors."""
        from torch.nn.functional import interpolate
        from torchvision.transforms.functional import normalize, to_tensor

        model, _, _ = clip(self.parameters.backbone, self.parameters.pretrained, device)
        size, how = model.visual.image_size, model.visual.preprocess_cfg
        size = (size, size) if isinstance(size, int) else tuple(size)

        def squash(image):
            resized = interpolate(to_tensor(image)[None], size, mode="bicubic", align_corners=False)[0]
            return normalize(resized, how["mean"], how["std"])

        return encode_images(model.encode_image, squash, images, device)

    def score(self, images, references, descriptions, device):
        """Return one distance for all images together."""
        import torch

        x, y = self.encode(flat(images), device).double(), references.to(device).double()

        def kernel(a, b):
            distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # products would lose digits
            return torch.exp(-distances.square() / (2 * p.sigma**2))

        def within(a):
            k, n = kernel(a, a), len(a)
            return (k.sum() - k.trace()) / (n * (n - 1)) if p.estimate == "unbiased" else k.mean()

        p = self.parameters
        return [SCALE * float(within(x) + within(y) - 2 * kernel(x, y).mean())]
