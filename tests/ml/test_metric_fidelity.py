"""Metrics beside the official code of their encoders: images as they prepare them, activations as they build them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms

import suites
from metrics import cmmd, topiq
from metrics.clip_image import Parameters as ClipParameters
from metrics.encoders import clip
from metrics.open_clip_tables import check_activation
from metrics.self_supervised_image import Parameters, SelfSupervisedImage, dino_official
from tests.test_suite_mistakes import assert_says

CPU = torch.device("cpu")


@pytest.fixture
def noise():
    """Images that are not square, and larger than the encoders' inputs."""
    source = np.random.default_rng(0)
    return [Image.fromarray(source.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((300, 520), (411, 283))]


def test_dino_official_is_the_transform_of_its_eval_knn(noise):
    """`extract_feature_pipeline`: Resize(256, interpolation=3), CenterCrop(224); timm's own is 248 and 224."""
    import timm

    official = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0)
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for image in noise:
        assert torch.equal(dino_official(model)(image), official(image))
        assert not torch.equal(own(image), official(image))
    assert own.transforms[0].size == 248


def test_presets_of_dino_differ_by_their_images_alone(noise):
    """On the testbed's encoder; and each has its own features."""
    as_timm = SelfSupervisedImage(Parameters("testbed"))
    official = SelfSupervisedImage(Parameters("testbed", **SelfSupervisedImage.presets["dino_official"]))

    assert not torch.allclose(as_timm.encode(noise, CPU), official.encode(noise, CPU), atol=1e-4)
    assert "preprocessing" in SelfSupervisedImage.encoder_parameters
    assert as_timm.about()["preprocessing"] != official.about()["preprocessing"]


def _released_cmmd(image, size):
    """`_center_crop_and_resize`, then `_resize_bicubic` of `embedding.py`, both of the released code's steps."""
    width, height = image.size
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), resample=Image.BICUBIC)
    values = torch.from_numpy(np.asarray(square).astype(np.float32) / 255.0).permute(2, 0, 1)
    return torch.nn.functional.interpolate(values[None], size=(size, size), mode="bicubic")[0]


def test_released_cmmd_crops_and_antialiases(noise):
    """The preset's images are those of the released code; the default's are squashed and not antialiased."""
    preset = cmmd.Parameters(**cmmd.Cmmd.presets["released"])

    assert (preset.preprocessing, preset.estimate) == ("released", "biased")
    for image in noise:
        expected = _released_cmmd(image, 336)

        assert torch.allclose(cmmd.cropped(image, (336, 336)), expected, atol=1e-6)
        assert (cmmd.squashed(image, (336, 336)) - expected).abs().mean() > 0.05


def test_released_cmmd_scores_the_released_images(noise):
    """Through the testbed's encoder: unit vectors of the cropped images, the biased estimate written out."""
    given = {"backbone": "testbed", "pretrained": None, "sigma": 0.5}
    released = cmmd.Cmmd(cmmd.Parameters(**given, **cmmd.Cmmd.presets["released"]))
    model, _, _ = clip("testbed", None, CPU)
    how = model.visual.preprocess_cfg
    mean, deviation = (torch.tensor(how[k]).view(3, 1, 1) for k in ("mean", "std"))
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    vectors = []
    for image in noise:
        with torch.no_grad():
            vector = model.encode_image(((_released_cmmd(image, size) - mean) / deviation)[None])[0].double()
        vectors.append(vector / vector.norm())
    kernel = [[float(torch.exp(-((a - b) ** 2).sum() / (2 * 0.5**2))) for a in vectors] for b in vectors]
    # x = {first}, y = {second}
    expected = 1000 * (kernel[0][0] + kernel[1][1] - 2 * kernel[0][1])

    value = released.score([noise[:1]], released.known(noise[1:], CPU), ["x"], CPU)[0]
    assert value == pytest.approx(expected, abs=1e-3)


def test_refused_pairs_are_those_that_open_clip_warns_about():
    """Every pair of its table: refused when the tag needs QuickGELU and the model lacks it; the named one passes."""
    wrong, right = [], []
    for model, tag in open_clip.list_pretrained():
        needs = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
        has = (open_clip.get_model_config(model) or {}).get("quick_gelu", False)
        try:
            check_activation(model, tag)
            refused = False
        except ValueError as error:
            refused = True
            named = str(error).rpartition(" ")[2]
            assert open_clip.is_pretrained_cfg(named, tag)
            check_activation(named, tag)
        (wrong if needs and not has else right).append((model, tag, refused))

    assert len(wrong) > 20 and len(right) > 100
    assert all(refused for *_, refused in wrong)
    assert not any(refused for *_, refused in right)


@pytest.mark.parametrize(("model", "tag"), [("ViT-B/16", "openai"), ("ViT-L-14", "OpenAI"), ("RN50", "cc12m")])
def test_spellings_that_open_clip_takes_are_refused_too(model, tag):
    """Where the encoder is loaded, and in the parameters of each metric."""
    for call in (lambda: clip(model, tag, CPU), lambda: ClipParameters(model, tag)):
        with pytest.raises(ValueError, match="QuickGELU"):
            call()


@pytest.mark.parametrize("name", ["clip_image", "clip_text", "cmmd", "clip_image_imma_released"])
def test_suite_with_a_wrong_activation_is_refused_before_any_compute(project, name):
    """In one line that names the right model."""
    entry = f"{{method: {name}, backbone: ViT-B-16, pretrained: openai}}"
    project.write(project.edited(("metrics: [clip_image, clip_text]", f"metrics: [{entry}]")))
    outcome = project.validate()

    assert_says(outcome, project, ":17: ", "were trained with QuickGELU")
    assert_says(outcome, project, ":17: ", "use backbone: ViT-B-16-quickgelu")


def test_bundled_suites_name_models_with_the_right_activation():
    """freezeasguard names OpenAI's ViT-B/16."""
    text = (Path(suites.__file__).parent / "freezeasguard.yaml").read_text(encoding="utf-8")
    assert "ViT-B-16-quickgelu, pretrained: openai" in text
    assert "ViT-B-16, pretrained: openai" not in text


def test_topiq_of_freezeasguard_has_the_weights_of_pipal(monkeypatch):
    """pyiqa's `topiq_fr-pipal`, which compares with references, by its own file."""
    built = []

    class Module:
        def create_metric(self, name, **options):
            built.append(name)
            raise KeyError(name)

    monkeypatch.setitem(sys.modules, "pyiqa", Module())
    given = topiq.Parameters(**topiq.Topiq.presets["freezeasguard"])
    with pytest.raises(KeyError):
        topiq.network.__wrapped__(given.variant, None, CPU)

    assert built == ["topiq_fr-pipal"]
    assert topiq.Topiq.fetches(given)[0].parts == (("cfanet_fr_pipal_res50-69bbe5ba.pth",),)
