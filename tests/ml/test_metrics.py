"""Metrics: cosines over all pairs, through encoders loaded from folders in hub layout."""

from __future__ import annotations

import open_clip
import pytest
import torch
from PIL import Image

from metrics.clip_image import ClipImage
from metrics.clip_image import Parameters as ImageParameters
from metrics.clip_text import ClipText
from metrics.clip_text import Parameters as TextParameters

CPU = torch.device("cpu")


@pytest.fixture
def images(tiny_folder):
    return [Image.open(f).convert("RGB") for f in sorted((tiny_folder / "purse").glob("*.png"))]


@pytest.fixture
def backbone(tiny_folder):
    return f"local-dir:{tiny_folder / 'clip'}"


def _features(backbone, images):
    """Encode one image at a time with open_clip alone."""
    model, transform = open_clip.create_model_from_pretrained(backbone)
    model.eval()
    with torch.no_grad():
        vectors = [model.encode_image(transform(image)[None])[0] for image in images]
    return [v / v.norm() for v in vectors]


def test_image_similarity_is_the_mean_cosine_over_all_pairs(images, backbone):
    """Written out pair by pair, for two prompts with different numbers of images."""
    metric = ClipImage(ImageParameters(backbone, None))
    groups, references = [images[:2], images[2:5]], images[5:8]
    values = metric.score(groups, metric.known(references, CPU), ["x", "y"], CPU)
    known = _features(backbone, references)
    for value, group in zip(values, groups, strict=True):
        pairs = [float(a @ b) for a in _features(backbone, group) for b in known]

        assert value == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_image_similarity_of_an_image_with_itself_is_one(images, backbone):
    """The upper end of the range."""
    metric = ClipImage(ImageParameters(backbone, None))

    known = metric.known(images[:1], CPU)
    assert metric.score([images[:1]], known, ["x"], CPU)[0] == pytest.approx(1.0, abs=1e-5)


def test_text_alignment_is_a_hundred_times_the_cosine(images, backbone):
    """Against open_clip's own towers."""
    metric = ClipText(TextParameters(backbone, None))
    value = metric.score([images[:1]], [], ["a purse"], CPU)[0]
    model, _ = open_clip.create_model_from_pretrained(backbone)
    with torch.no_grad():
        text = model.eval().encode_text(open_clip.get_tokenizer(backbone)(["a purse"]))[0]
    cosine = float(_features(backbone, images[:1])[0] @ (text / text.norm()))

    assert value == pytest.approx(100 * cosine, abs=1e-3)


def test_backbone_in_a_folder_is_a_file_of_the_metric_and_a_name_is_not(backbone, tiny_folder, tmp_path):
    """What lies here enters the identity by its content; what a library knows by name, by its name."""
    weights = str(tmp_path / "weights.safetensors")

    assert ClipImage.files(ImageParameters(backbone, None)) == {"backbone": tiny_folder / "clip"}
    assert ClipImage.files(ImageParameters("ViT-B-32", weights)) == {"pretrained": tmp_path / "weights.safetensors"}
    assert ClipImage.files(ImageParameters()) == {}


def test_nearest_training_image_is_the_greatest_cosine(monkeypatch):
    """A drawn image that is a training image scores one, whatever the others are like."""
    from metrics.nearest_training_image import NearestTrainingImage

    vectors = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (0.6, 0.8)}
    metric = NearestTrainingImage(NearestTrainingImage.Parameters("testbed"))
    monkeypatch.setattr(metric, "encode", lambda images, device: torch.tensor([vectors[i] for i in images]))

    known = metric.known(["a", "c"], CPU)
    assert metric.score([["a"], ["c", "b"]], known, ["x", "y"], CPU) == pytest.approx([1.0, (1.0 + 0.8) / 2])
