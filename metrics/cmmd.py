"""CMMD (Jayasumana et al. 2024): squared MMD between CLIP features of drawn and reference images, times 1000.

Unit vectors of CLIP ViT-L/14 at 336 pixels, a Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)) with sigma 10.

Images, by `preprocessing`
    squash    resized to the encoder's input without a crop: bicubic, not antialiased, on values in [0, 1].
    released  as the released code (google-research `cmmd/io_util.py`, and sayakpaul/cmmd-pytorch `io_util.py`,
              `CMMDDataset._center_crop_and_resize`): the largest square at the centre, resized by PIL's BICUBIC, which
              antialiases and rounds to bytes. Its second resizing, in `embedding.py`, is to the same size: no change.

The released code uses the biased estimate, which includes the diagonal. The default here is the unbiased estimate,
which does not grow with fewer images and may be negative. The preset `released` has the released images and estimate.
Differences from the released code even so: open_clip's port of the weights instead of transformers'; no images are left
out (the JAX code drops those that do not fill a batch).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.core.registry import register
from metrics.encoders import clip, encode_images, flat
from metrics.open_clip_metric import OpenClipMetric
from metrics.open_clip_tables import check_activation

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SCALE = 1000.0


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of the paper, except the estimate and the images' preprocessing."""

    backbone: str = "ViT-L-14-336-quickgelu"
    """An open_clip model name, "hf-hub:…", "local-dir:…", or "testbed"."""
    pretrained: str | None = "openai"
    """An open_clip weight tag or a local safetensors file."""
    sigma: Annotated[float, Field(gt=0)] = 10.0
    """Width of the kernel."""
    estimate: Literal["unbiased", "biased"] = "unbiased"
    preprocessing: Literal["squash", "released"] = "squash"
    """How images get the encoder's size; see above."""

    def __post_init__(self) -> None:
        """Reject weights that the backbone's activation does not fit."""
        check_activation(self.backbone, self.pretrained)


@register("metric")
class Cmmd(OpenClipMetric):
    """Squared MMD between CLIP features of drawn images and references, times 1000."""

    name = "cmmd"
    version = 1
    direction = "lower"
    scope = "set"
    unit = "1000 x squared MMD"
    range = (-2 * SCALE, 2 * SCALE)
    encoder = "open_clip_cmmd@1"
    encoder_parameters = ("backbone", "pretrained", "preprocessing")
    Parameters = Parameters
    presets = {
        "released": {"estimate": "biased", "preprocessing": "released"},  # cmmd-pytorch
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
        images = {"squash": "bicubic without crop", "released": "centre crop, PIL bicubic"}[p.preprocessing]
        return {**super().about(), "preprocessing": f"{images}; {p.estimate}, sigma {p.sigma:g}"}

    def encode(self, images, device):
        """Return unit vectors."""
        from torchvision.transforms.functional import normalize

        model, _, _ = clip(self.parameters.backbone, self.parameters.pretrained, device)
        size, how = model.visual.image_size, model.visual.preprocess_cfg
        size = (size, size) if isinstance(size, int) else tuple(size)

        fit = {"squash": squashed, "released": cropped}[self.parameters.preprocessing]

        def prepare(image):
            return normalize(fit(image, size), how["mean"], how["std"])

        return encode_images(model.encode_image, prepare, images, device)

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


def squashed(image: Image, size: tuple[int, int]) -> Tensor:
    """Return an image [3, height, width] in [0, 1], resized to (height, width) without a crop and antialiasing."""
    from torch.nn.functional import interpolate
    from torchvision.transforms.functional import to_tensor

    return interpolate(to_tensor(image)[None], size, mode="bicubic", align_corners=False)[0]


def cropped(image: Image, size: tuple[int, int]) -> Tensor:
    """Return the largest square at an image's centre, resized by PIL's BICUBIC: [3, height, width] in [0, 1]."""
    from PIL.Image import Resampling
    from torchvision.transforms.functional import to_tensor

    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    return to_tensor(square.resize(size[::-1], Resampling.BICUBIC))
