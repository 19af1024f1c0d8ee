"""SSCD, TOPIQ and CLIP's text score: against the libraries or a direct computation, all offline."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.functional.multimodal import clip_score
from torchvision.transforms.functional import to_tensor

from metrics import topiq
from metrics.clip_text import ClipText
from metrics.sscd import MEAN, Sscd

CPU = torch.device("cpu")


@pytest.fixture
def images(tiny_folder):
    return [Image.open(f).convert("RGB") for f in sorted((tiny_folder / "purse").glob("*.png"))]


# -- CLIP text score -----------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """open_clip's towers as torchmetrics calls a model of transformers."""

    def __init__(self, backbone):
        super().__init__()
        self.model, self.transform = open_clip.create_model_from_pretrained(backbone)
        self.model.eval()
        self.tokenize = open_clip.get_tokenizer(backbone)
        self.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77))

    def get_image_features(self, pixels):
        return self.model.encode_image(pixels)

    def get_text_features(self, tokens, mask):
        return self.model.encode_text(tokens)

    def process(self, text=None, images=None, **_):
        if images is not None:
            seen = [Image.fromarray(np.asarray(i.permute(1, 2, 0), dtype=np.uint8)) for i in images]
            return {"pixel_values": torch.stack([self.transform(i) for i in seen])}
        tokens = self.tokenize(text)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_clip_text_equals_torchmetrics_where_that_is_not_at_its_floor(images, tiny_folder):
    """On the same pixels and words; below zero torchmetrics says zero, and this says how far."""
    backbone = f"local-dir:{tiny_folder / 'clip'}"
    wrapped = Wrapped(backbone)
    metric = ClipText(ClipText.Parameters(backbone, None))
    texts = ["a purse", "a cat on the beach", "a drawing of a purse", "x", "on", "the"]
    values = metric.score([images[:3]] * len(texts), [], texts, CPU)
    pixels = [torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images[:3]]
    own = [
        float(clip_score(pixels, [text] * 3, model_name_or_path=lambda: (wrapped, wrapped.process))) for text in texts
    ]

    assert [max(0.0, value) for value in values] == pytest.approx(own, abs=1e-3)
    assert max(own) > 0 and min(values) < 0  # both sides of the floor were seen


# -- SSCD ----------------------------------------------------------------------------------------------------------


class Descriptor(torch.nn.Module):
    """Stands for SSCD: a descriptor of images of any size."""

    def __init__(self):
        super().__init__()
        self.seen = torch.nn.Conv2d(3, 16, 8, 8)

    def forward(self, batch):
        return torch.nn.functional.normalize(self.seen(batch).relu().mean(dim=(2, 3)), dim=-1)


@pytest.fixture
def scripted(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "sscd_tiny.torchscript.pt"
    torch.jit.script(Descriptor().eval()).save(str(path))
    return str(path)


@pytest.mark.parametrize(("resize", "size"), [("small_edge", 64), ("square", 80)])
def test_sscd_is_the_greatest_cosine_with_a_training_image(images, scripted, resize, size):
    """Written out image by image, for sizes that differ."""
    images = [image.resize((60 + 20 * i, 72)) for i, image in enumerate(images)]
    metric = Sscd(Sscd.Parameters(scripted, resize, size))
    groups, trained = [images[:2], images[2:5]], images[4:8]
    values = metric.score(groups, metric.known(trained, CPU), ["x", "y"], CPU)
    model, deviation = torch.jit.load(scripted), (0.229, 0.224, 0.225)

    def describe(image):
        width, height = image.size
        least = min(width, height)
        to = (size, size) if resize == "square" else (int(size * width / least), int(size * height / least))
        pixels = to_tensor(image.resize(to, Image.Resampling.BILINEAR))
        mean, spread = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, deviation))
        with torch.no_grad():
            return model(((pixels - mean) / spread)[None])[0]

    for value, group in zip(values, groups, strict=True):
        nearest = [max(float(describe(a) @ describe(b)) for b in trained) for a in group]
        assert value == pytest.approx(sum(nearest) / len(nearest), abs=1e-5)
    assert values[1] > values[0]  # one of the second prompt's images was trained on


def test_sscd_as_the_works_on_memorization_have_it(images, scripted):
    """Preset wen: the shorter side to 256, the centre of 224, mean and deviation 0.5."""
    from harness.core.parameters import resolve

    values, mistakes = resolve(Sscd, {"weights": scripted}, "wen")
    assert not mistakes
    image = images[0].resize((300, 260))
    pixels = to_tensor(image.resize((295, 256), Image.Resampling.BILINEAR))
    top, left = 16, round((295 - 224) / 2)
    with torch.no_grad():
        wanted = torch.jit.load(scripted)(((pixels[:, top : top + 224, left : left + 224] - 0.5) / 0.5)[None])[0]

    found = Sscd(values).encode([image], CPU)[0]
    assert float(found @ torch.nn.functional.normalize(wanted, dim=0)) == pytest.approx(1, abs=1e-5)
    assert Sscd(values).about()["preprocessing"] == "small edge 256, bilinear, centre of 224, mean and deviation 0.5"
    _, mistakes = resolve(Sscd, {"weights": scripted, "crop": 300}, "wen")
    assert "crop 300 is larger than size 256" in str(mistakes)


def test_sscd_of_a_copy_is_one(images, scripted):
    """And it stands beside the scores, against the attack's images."""
    metric = Sscd(Sscd.Parameters(scripted, size=64))

    assert metric.score([images[1:2]], metric.known(images[:3], CPU), ["x"], CPU) == [pytest.approx(1.0, abs=1e-5)]
    assert (Sscd.direction, Sscd.compares_with) == ("none", "attack")


# -- TOPIQ ---------------------------------------------------------------------------------------------------------


class Quality(torch.nn.Module):
    """Stands for pyiqa's network, which its licence keeps out of the tests: it has a weight, and sees what it gets."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))


class Model(torch.nn.Module):
    """The form of what pyiqa.create_metric gives."""

    def __init__(self, name, device, **options):
        super().__init__()
        assert options == {"pretrained": False, "backbone_pretrain": False}  # it would unpickle weights
        self.name, self.net = name, Quality()

    def forward(self, image, reference=None):
        assert (reference is None) == (self.name == "topiq_nr")
        assert image.min() >= 0 and image.max() <= 1 and image.shape[:2] == (1, 3)
        if reference is None:
            return self.net.scale * image.mean().view(1, 1)
        assert reference.shape == image.shape
        return self.net.scale * (1 - (image - reference).abs().mean()).view(1, 1)


@pytest.fixture
def pyiqa(monkeypatch):
    """A module in its place."""
    module = ModuleType("pyiqa")
    module.create_metric = Model
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    topiq.network.cache_clear()
    yield
    topiq.network.cache_clear()


@pytest.fixture
def weights(tmp_path):
    """A file as saved from several GPUs."""
    save_file({"module.scale": torch.tensor(0.5)}, tmp_path / "topiq.safetensors")
    return str(tmp_path / "topiq.safetensors")


def test_topiq_against_references_is_the_mean_over_all_pairs(pyiqa, images, weights):
    """References are resized to what was drawn."""
    references = [image.resize((50, 30)) for image in images[5:8]]
    metric = topiq.Topiq(topiq.Parameters("fr", weights))
    values = metric.score([images[:2], images[2:3]], references, ["x", "y"], CPU)
    for value, group in zip(values, (images[:2], images[2:3]), strict=True):
        pairs = [
            0.5 * (1 - float((to_tensor(a) - to_tensor(b.resize(a.size, Image.Resampling.BICUBIC))).abs().mean()))
            for a in group
            for b in references
        ]
        assert value == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_topiq_without_references_is_the_mean_of_the_drawn(pyiqa, images, weights):
    """At the size that was asked for."""
    metric = topiq.Topiq(topiq.Parameters("nr", weights, 64))
    value = metric.score([images[:2]], images[2:4], ["x"], CPU)[0]
    seen = [to_tensor(i.resize((64, 64), Image.Resampling.BICUBIC)).mean() for i in images[:2]]

    assert value == pytest.approx(0.5 * float(sum(seen)) / 2, abs=1e-6)


def test_topiq_reads_what_the_hub_gives_without_unpickling_code(pyiqa, monkeypatch, tmp_path):
    """A file that would run something is refused."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(tmp_path / name))
    name = topiq.FILES["nr"]
    torch.save({"params": {"scale": torch.tensor(0.25)}}, tmp_path / name)
    assert float(topiq.network("nr", None, CPU).net.scale) == 0.25

    topiq.network.cache_clear()
    torch.save({"params": Bomb()}, tmp_path / name)
    with pytest.raises(Exception, match="weights_only|Unsupported"):
        topiq.network("nr", None, CPU)
    assert not (tmp_path / "ran").exists()
