"""Self-supervised image similarity (DINO): cosine of features trained without text, over all pairs.

IMMA uses DINO v1 ViT-S/16; its scorer normalises by CLIP's mean and deviation (imma.md, trap T2). Here each backbone
gets its own mean and deviation.

Images, by `preprocessing`
    timm           timm's evaluation transform of the backbone: for DINO v1 the shorter side to 248 pixels (224 / 0.9,
                   bicubic), then the centre of 224. Not that of DINO's authors.
    dino_official  that of DINO's authors (facebookresearch/dino `eval_knn.py`, `extract_feature_pipeline`): the shorter
                   side to 256 pixels, bicubic, then the centre of 224, for encoders of other sizes in that ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from harness.contracts.metric import Metric
from harness.core.registry import register
from metrics.encoders import by_prompt, encode_images, fetched, flat, library, local_files, vision


@dataclass(frozen=True)
class Parameters:
    """Default: the backbone of IMMA's tables."""

    backbone: str = "vit_small_patch16_224.dino"
    """A timm model, "hf-hub:…", "local-dir:…", or "testbed"."""
    preprocessing: Literal["timm", "dino_official"] = "timm"
    """How images get the encoder's size; see above. Scores of DINO v1 differ by some 0.006."""


@register("metric")
class SelfSupervisedImage(Metric):
    """Cosine between self-supervised features of generated and reference images, averaged over all pairs."""

    name = "self_supervised_image"
    version = 1
    direction = "higher"
    unit = "cosine"
    range = (-1.0, 1.0)
    encoder = "timm@1"
    encoder_parameters = ("backbone", "preprocessing")
    Parameters = Parameters
    presets = {
        "dino_official": {"preprocessing": "dino_official"},  # eval_knn.py of DINO v1
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
            "preprocessing": self.preprocessing(),
            "library": library("timm"),
        }

    def preprocessing(self) -> str:
        """Return a description of how images are prepared."""
        is_official = self.parameters.preprocessing == "dino_official"
        return "DINO's: 256 pixels, centre of 224" if is_official else "timm's for the backbone"

    def encode(self, images, device):
        """Return unit vectors."""
        model, transform = vision(self.parameters.backbone, device)
        if self.parameters.preprocessing == "dino_official":
            transform = dino_official(model)
        return encode_images(model, transform, images, device)

    def score(self, images, references, descriptions, device):
        """Return the mean cosine of each prompt's images with all references, over all pairs."""
        return by_prompt((self.encode(flat(images), device) @ references.T).double().mean(dim=1), images)


def dino_official(model) -> Callable:
    """Return the transform of DINO's `eval_knn.py` for a timm model, with its input size, mean and deviation."""
    from torchvision import transforms

    config = model.pretrained_cfg
    side = config["input_size"][-1]
    return transforms.Compose(
        [
            transforms.Resize(side * 256 // 224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
