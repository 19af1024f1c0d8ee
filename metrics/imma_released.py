"""IMMA's released scorer with its defects, so that its numbers can be compared (papers' facts: imma.md, section 7).

Differences from the correct metrics:

- every image is first reduced to 64 x 64 pixels (bilinear, ignoring the aspect ratio);
- for CLIP and DINO, values in [0, 1] are "un-normalised" again, into [0.5, 1], then images are enlarged to the
  encoder's input (bicubic without antialiasing, the default of its torchvision) and normalised by CLIP's mean and
  deviation, also for DINO;
- LPIPS gets values in [0, 1], although the library expects [-1, 1].

Two differences from the release: encoders run in fp32 (CLIP on a GPU ran in fp16), and LPIPS is averaged over all
pairs, as in the published replication; the script compared by index, so it needed equal numbers of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.core.registry import register
from metrics.clip_image import ClipImage
from metrics.encoders import clip, encode_images, vision
from metrics.lpips_image import LpipsImage, Network
from metrics.self_supervised_image import SelfSupervisedImage

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SHRUNK = 64
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of OpenAI's CLIP, used for all encoders."""


def shrink(image: Image) -> Tensor:
    """Return an image of 64 x 64 pixels in [0, 1]."""
    from PIL.Image import Resampling
    from torchvision.transforms.functional import to_tensor

    return to_tensor(image.resize((SHRUNK, SHRUNK), Resampling.BILINEAR))


def preprocess(size: int) -> Callable[[Image], Tensor]:
    """Return the transform for an encoder that takes `size` pixels per side."""
    from torch.nn.functional import interpolate
    from torchvision.transforms.functional import normalize

    def transform(image: Image) -> Tensor:
        lifted = (shrink(image) + 1) / 2
        enlarged = interpolate(lifted[None], (size, size), mode="bicubic", align_corners=False)[0]
        return normalize(enlarged, CLIP_MEAN, CLIP_DEVIATION)

    return transform


def _side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[-1]


@register("metric")
class ClipImageImmaReleased(ClipImage):
    """CLIP image similarity as IMMA's released script computes it, on images of 64 x 64."""

    name = "clip_image_imma_released"
    version = 1
    encoder = "open_clip_imma_released@1"

    def about(self):
        return {**super().about(), "preprocessing": "IMMA's script: 64x64, values in [0.5, 1]"}

    def encode(self, images, device):
        """Return unit vectors."""
        model, _, _ = clip(self.parameters.backbone, self.parameters.pretrained, device)
        return encode_images(model.encode_image, preprocess(_side(model.visual.image_size)), images, device)


@dataclass(frozen=True)
class Encoder:
    """Default: the backbone of IMMA's tables; the preprocessing is its script's."""

    backbone: str = "vit_small_patch16_224.dino"
    """A timm model, "hf-hub:…", "local-dir:…", or "testbed"."""


@register("metric")
class SelfSupervisedImageImmaReleased(SelfSupervisedImage):
    """DINO similarity as IMMA's released script computes it: 64 x 64, with CLIP's mean and deviation."""

    name = "self_supervised_image_imma_released"
    version = 1
    encoder = "timm_imma_released@1"
    encoder_parameters = ("backbone",)
    Parameters = Encoder
    presets = {"testbed": {"backbone": "testbed"}}

    def preprocessing(self) -> str:
        """Return a description of `encode`'s preprocessing."""
        return "IMMA's script: 64x64, values in [0.5, 1], CLIP's mean"

    def encode(self, images, device):
        """Return unit vectors."""
        model, _ = vision(self.parameters.backbone, device)
        return encode_images(model, preprocess(_side(model.pretrained_cfg["input_size"])), images, device)


@register("metric")
class LpipsImmaReleased(LpipsImage):
    """1 - LPIPS as IMMA's released script computes it: 64 x 64, in the wrong range, over all pairs."""

    name = "lpips_imma_released"
    version = 1

    Parameters = Network
    presets = {"testbed": {"net": "testbed"}}

    def preprocessing(self) -> str:
        """Return a description of `prepare`."""
        return "IMMA's script: 64x64, in [0, 1]"

    def prepare(self, image: Image) -> Tensor:
        """Return an image [3, 64, 64]."""
        return shrink(image)
