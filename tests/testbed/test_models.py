"""The shipped generator and evaluators load without a network and do their work."""
import numpy as np
import pytest
import torch

from harness.core.paths import CLIP, GENERATOR, ROOT, VIT
from harness.testbed import captions, catalog, evaluate, images, training


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def pipeline():
    return evaluate.load_pipeline(ROOT)


def test_generator_is_what_it_says(pipeline):
    assert pipeline.safety_checker is None
    assert pipeline.unet.dtype == torch.float32
    assert pipeline.tokenizer.model_max_length == 16
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size == 128
    assert pipeline.vae_scale_factor == 4 and pipeline.unet.config.sample_size == 16
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    count = sum(p.numel() for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)
                for p in part.parameters())
    assert 4e6 < count < 6e6


def test_generator_is_deterministic_for_a_seed(pipeline):
    texts = [captions.caption("red apple", "noto"), captions.caption("red apple", "silhouette")]
    first, again = (evaluate.sample(pipeline, texts, seed=3, steps=4) for _ in range(2))
    other = evaluate.sample(pipeline, texts, seed=4, steps=4)
    assert first.shape == (2, 64, 64, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_latents_have_unit_deviation(pipeline):
    names = [f"noto/{slug}" for slug, entry in catalog.load().objects.items() if entry.learned]
    pictures = training.to_tensor(np.stack([np.asarray(picture) for picture in images.read(names)]))
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures).latent_dist.mean * pipeline.vae.config.scaling_factor
        output = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert latents.shape[1:] == (4, 16, 16) and 0.8 < float(latents.std()) < 1.2
    assert -10 * np.log10(float((output - pictures).square().mean()) / 4) > 24


def test_tokenizer_knows_every_label_and_fits_the_length(pipeline):
    for entry in catalog.load().objects.values():
        for style in catalog.load().styles:
            tokens = pipeline.tokenizer(captions.caption(entry.label, style)).input_ids
            assert len(tokens) <= 16 and tokens[-1] == max(pipeline.tokenizer.get_vocab().values())


def test_clip_tells_styles_and_objects_apart():
    listing = catalog.load()
    clip = evaluate.Clip(CLIP, [entry.label for entry in listing.objects.values()])
    names = [name for name in listing.images if name.startswith(("noto/", "silhouette/"))]
    seen = clip.see(training.to_tensor(np.stack([np.asarray(picture) for picture in images.read(names)])))
    objects = torch.tensor([list(listing.objects).index(name.split("/")[1]) for name in names])
    styles = torch.tensor([list(listing.styles).index(name.split("/")[0]) for name in names])
    assert evaluate.top(seen @ clip.styles.T, styles, 1) > 0.8
    assert evaluate.top(seen @ clip.objects.T, objects, 5) > 0.7


def test_vit_puts_drawings_of_one_object_together():
    import timm

    listing = catalog.load()
    model = timm.create_model(f"local-dir:{VIT}", pretrained=True, num_classes=0).eval()
    slugs = [slug for slug, entry in listing.objects.items() if entry.learned]
    parts = []
    for style in ("fluent", "flat"):
        pictures = images.read(f"{style}/{slug}" for slug in slugs)
        pixels = np.stack([np.asarray(picture) for picture in pictures])
        features = evaluate.vit_features(model, training.to_tensor(pixels))
        parts.append(torch.nn.functional.normalize(features - features.mean(0), dim=1))
    nearest = (parts[0] @ parts[1].T).argmax(1)
    assert float((nearest == torch.arange(len(slugs))).float().mean()) > 0.5


def test_folder_loads_with_plain_diffusers():
    from diffusers import StableDiffusionPipeline

    assert StableDiffusionPipeline.from_pretrained(GENERATOR, torch_dtype=torch.float32).unet is not None
