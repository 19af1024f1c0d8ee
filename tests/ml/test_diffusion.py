"""Encoded images, draws by step, and the denoising loss."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from harness.training import diffusion


@pytest.fixture
def encoded(model, make_run, purse_files):
    images = [Image.open(f) for f in purse_files]
    return diffusion.encode_images(model, make_run(), images, ["a purse"] * 4, flip=True)


def _draw(encoded, step, **changes):
    options = {"batch_size": 2, "timesteps": 1000, "seed": 7, "step": step, "device": "cpu"} | changes
    return diffusion.draw(encoded, **options)


def test_draw_depends_on_seed_and_step_alone(encoded):
    """Drawing step 5 first gives what step 5 gives after five others: a resumed run sees the same batches."""
    first = _draw(encoded, 5)
    for step in range(5):
        _draw(encoded, step)
    again = _draw(encoded, 5)
    other = _draw(encoded, 5, seed=8)

    assert torch.equal(first.latents, again.latents) and torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)


def test_every_image_is_seen_once_before_any_is_seen_again(model, make_run, purse_files):
    """Captions tell the images apart; two batches of two are one epoch of four."""
    images = [Image.open(f) for f in purse_files]
    encoded = diffusion.encode_images(model, make_run(), images, ["a", "b", "c", "d"], flip=False)
    for epoch in range(3):
        seen = torch.cat([_draw(encoded, 2 * epoch + i).embeddings for i in range(2)])
        matches = [[torch.equal(s, e) for e in encoded.embeddings].index(True) for s in seen]

        assert sorted(matches) == [0, 1, 2, 3]


def test_latents_are_those_of_the_vae(model, make_run, purse_files):
    """Mean and deviation are the posterior's; the second flip is the mirrored image."""
    images = [Image.open(f) for f in purse_files]
    encoded = diffusion.encode_images(model, make_run(), images, ["a"] * 4, flip=True)
    with torch.no_grad():
        given = diffusion.pixels(images, model.image_size)
        posterior = model.vae.encode(given.flip(-1)).latent_dist

    assert torch.allclose(encoded.mean[1], posterior.mean, atol=1e-5)
    assert torch.allclose(encoded.deviation[1], posterior.std, atol=1e-5)


def test_loss_is_the_mean_squared_error_of_the_noise(model, make_run, encoded):
    """The formula of the papers, written out with diffusers alone."""
    batch = _draw(encoded, 0)
    scheduler = model.noise_scheduler()
    losses, _, _ = diffusion.denoising_losses(model, make_run(), scheduler, batch)
    with torch.no_grad():
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        said = model.unet(noisy, batch.timesteps, batch.embeddings).sample

    assert losses.mean().item() == pytest.approx(torch.nn.functional.mse_loss(said, batch.noise).item(), rel=1e-6)


def test_v_prediction_is_asked_for_the_velocity(model, make_run, encoded):
    """v = sqrt(abar) noise - sqrt(1 - abar) latent (Salimans and Ho 2022), from the schedule's own products."""
    from diffusers import DDPMScheduler

    batch = _draw(encoded, 0)
    scheduler = DDPMScheduler.from_config(model.pipeline.scheduler.config, prediction_type="v_prediction")
    losses, noisy, prediction = diffusion.denoising_losses(model, make_run(), scheduler, batch)

    kept = scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    velocity = kept.sqrt() * batch.noise - (1 - kept).sqrt() * batch.latents
    expected = (prediction - velocity).square().flatten(1).mean(1)
    assert torch.allclose(losses, expected, rtol=1e-5)
    assert torch.allclose(noisy, kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise, atol=1e-6)


def test_other_prediction_types_are_refused(model, make_run, encoded):
    """A model that predicts the image itself would be trained towards noise."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(model.pipeline.scheduler.config, prediction_type="sample")
    with pytest.raises(ValueError, match="prediction type 'sample' is not supported"):
        diffusion.denoising_losses(model, make_run(), scheduler, _draw(encoded, 0))


def test_images_without_captions_are_refused(model, make_run, purse_files):
    """A caption an image, or nothing is trained."""
    with pytest.raises(ValueError, match="4 images but 1 captions"):
        diffusion.encode_images(model, make_run(), [Image.open(f) for f in purse_files], ["a"], flip=False)
