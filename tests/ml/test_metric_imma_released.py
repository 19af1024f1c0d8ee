"""IMMA's released scorer: its preprocessing written out once more, through open_clip and timm alone."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

from harness.core import paths
from metrics.clip_image import ClipImage
from metrics.imma_released import ClipImageImmaReleased, SelfSupervisedImageImmaReleased, preprocess
from metrics.self_supervised_image import SelfSupervisedImage

CPU = torch.device("cpu")
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def images(tiny_folder):
    """Images that are not square, and larger than 64 pixels."""
    opened = [Image.open(f).convert("RGB") for f in sorted((tiny_folder / "purse").glob("*.png"))]
    return [image.resize((90, 120), Image.Resampling.NEAREST) for image in opened]


def _as_released(image, size):
    """The steps of the script in torchvision's words: shrink, un-normalise what is in [0, 1], enlarge, normalise."""
    steps = transforms.Compose(
        [
            transforms.Resize((64, 64), antialias=True),
            transforms.ToTensor(),
            transforms.Normalize([-1.0] * 3, [2.0] * 3),
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC, antialias=False),
            transforms.CenterCrop(size),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )
    return steps(image)


def _clip(folder):
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval().encode_image


def _vit(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()


@pytest.mark.parametrize("kind", ["clip", "clip_testbed", "vit"])
def test_similarity_over_all_pairs_as_the_script_computes_it(images, tiny_folder, kind):
    """Mean of the product of unit features; the encoder's input of 32 or 64 pixels stands for 224."""
    folder = {"clip": tiny_folder / "clip", "clip_testbed": paths.CLIP, "vit": paths.VIT}[kind]
    encode, size = (_vit if kind == "vit" else _clip)(folder), 32 if kind == "clip" else 64
    cls, proper = (
        (SelfSupervisedImageImmaReleased, SelfSupervisedImage) if kind == "vit" else (ClipImageImmaReleased, ClipImage)
    )
    given = (f"local-dir:{folder}",) if kind == "vit" else (f"local-dir:{folder}", None)
    drawn, known = images[:3], images[3:7]
    with torch.no_grad():
        sets = [encode(torch.stack([_as_released(i, size) for i in part])) for part in (drawn, known)]
    x, y = (torch.nn.functional.normalize(s, dim=-1) for s in sets)
    metric, other = cls(cls.Parameters(*given)), proper(proper.Parameters(*given))

    value = metric.score([drawn], metric.known(known, CPU), ["x"], CPU)[0]
    assert value == pytest.approx(float((x @ y.T).mean()), abs=1e-5)
    assert abs(value - other.score([drawn], other.known(known, CPU), ["x"], CPU)[0]) > 1e-4


def test_values_end_in_the_upper_half_before_normalising(images):
    """Trap T2: black becomes the grey of 0.5, white stays."""
    transform = preprocess(96)
    for shade, expected in ((0, 0.5), (255, 1.0)):
        seen = transform(Image.new("RGB", (80, 40), (shade,) * 3))
        values = seen * torch.tensor(DEVIATION).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)

        assert values.shape == (3, 96, 96)
        assert torch.allclose(values, torch.full_like(values, expected), atol=1e-5)
    assert to_tensor(images[0]).min() < 0.4  # so that the shift above is one


def test_its_features_are_kept_apart_from_the_proper_ones():
    """Another encoder in the identity of a features stage."""
    assert ClipImageImmaReleased.encoder != ClipImage.encoder
    assert SelfSupervisedImageImmaReleased.encoder != SelfSupervisedImage.encoder
