"""IMMA: which level steps when, what changes, and in which direction."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from defenses.base import ProtectedConcept
from defenses.imma import Imma, Parameters, _levels
from harness.seeds import mix
from harness.training import diffusion
from harness.training.selection import select


def _protect(model, run, files, **changes):
    options = {"rounds": 3, "batch_size": 2, "upper_learning_rate": 1e-3} | changes
    target = ProtectedConcept("object", "purse", ("a purse",) * len(files), files)
    return Imma(dataclasses.replace(Parameters(), **options)).protect(model, [target], [], run)


@pytest.mark.parametrize(
    ("profile", "rounds", "images", "expected"),
    [
        ("paper", 3, 5, "lululu"),
        ("released", 4, 4, "lulululu"),
        # five batches an epoch: index 4 and the next epoch's index 0 are both lower steps (trap T8)
        ("released", 4, 5, "lulullulu"),
        ("released", 2, 1, "lulu"),
    ],
)
def test_levels_alternate_as_the_profile_says(profile, rounds, images, expected):
    """Worked by hand for batches of one."""
    assert "".join(level[0] for level in _levels(Parameters(profile=profile, rounds=rounds), images)) == expected


def test_only_attention_projections_change(model, make_run, purse_files):
    """S is q, k, v and out of self- and cross-attention; nothing else may move."""
    before = {n: p.detach().clone() for n, p in model.parameters().items()}
    protection = _protect(model, make_run(), purse_files)
    attention = set(select(before, "attention"))

    assert set(protection.tensors) == attention
    assert any(not torch.equal(protection.tensors[n], before[n]) for n in attention)
    for name, parameter in model.parameters().items():
        assert name in attention or torch.equal(parameter, before[name])


def test_adapter_is_gone_afterwards_and_the_model_can_be_restored(model, make_run, purse_files):
    """The lower level's LoRA is not released."""
    before = {n: p.detach().clone() for n, p in model.parameters().items()}
    _protect(model, make_run(), purse_files)

    assert model.is_restorable()
    model.restore()
    assert all(torch.equal(p, before[n]) for n, p in model.parameters().items())


def test_upper_level_raises_the_loss_on_the_concept(model, make_run, purse_files):
    """Without a lower level that matters, ascent alone must make the concept harder to denoise."""
    from PIL import Image

    def loss():
        run = make_run()
        images = [Image.open(f) for f in purse_files]
        encoded = diffusion.encode_images(model, run, images, ["a purse"] * 4, flip=False)
        scheduler = model.noise_scheduler()
        with torch.no_grad():
            batches = [diffusion.draw(encoded, 4, 1000, seed=99, step=step, device=model.device) for step in range(8)]
            return sum(diffusion.denoising_losses(model, run, scheduler, b)[0].mean().item() for b in batches)

    before = loss()
    tensors = _protect(model, make_run(), purse_files, rounds=15, lower_learning_rate=1e-6).tensors
    model.restore()
    model.overlay(tensors)

    assert loss() > before


@pytest.mark.parametrize("profile", ["paper", "released"])
def test_same_seed_gives_the_same_weights_and_another_seed_others(model, make_run, purse_files, profile):
    """Bit for bit on one machine and thread count."""
    results = []
    for index, seed in enumerate((1, 1, 2)):
        results.append(_protect(model, make_run(seed, f"run{index}"), purse_files, profile=profile).tensors)
        model.restore()
    first, same, other = results

    assert all(torch.equal(first[n], same[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_profiles_give_different_weights(model, make_run, purse_files):
    """Clipping and the schedule make a difference on three images in batches of one."""
    results = []
    for profile in ("paper", "released"):
        run = make_run(1, profile)
        results.append(_protect(model, run, purse_files[:3], profile=profile, batch_size=1, rounds=4).tensors)
        model.restore()

    assert any(not torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_killed_run_goes_on_to_the_same_weights(model, make_run, purse_files, monkeypatch):
    """A run that dies after its fourth step and is started again ends where an undisturbed one does."""
    whole = _protect(model, make_run(1, "whole"), purse_files).tensors
    model.restore()

    broken = make_run(1, "broken")
    broken.checkpoint_interval_s = 0.0

    def die(done, total):
        if done == 5:
            raise KeyboardInterrupt

    broken.report = die
    with pytest.raises(KeyboardInterrupt):
        _protect(model, broken, purse_files)
    model.restore()
    resumed = _protect(model, make_run(1, "broken"), purse_files).tensors

    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


@pytest.mark.parametrize("profile", ["paper", "released"])
def test_weights_equal_a_loop_written_without_peft(model, make_run, purse_files, profile):
    """The same draws through W + BA as plain arithmetic on the UNet's weights end in the same released weights."""
    from PIL import Image
    from torch.func import functional_call

    from harness.training import lora

    run = make_run(5)
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    ours = _protect(model, run, purse_files, profile=profile, rounds=4, lower_learning_rate=1e-2).tensors
    model.restore()

    images = [Image.open(f) for f in purse_files]
    encoded = diffusion.encode_images(model, run, images, ["a purse"] * len(images), flip=True)
    with lora.injected(model, rank=4, alpha=4, target_modules=targets, seed=run.seed_for("adapter")) as adapter:
        factors = {n.replace(".default", ""): p.detach().clone().requires_grad_() for n, p in adapter.items()}
    upper = {
        n.removeprefix("unet."): p.detach().clone().requires_grad_() for n, p in model.parameters().items() if n in ours
    }
    lower_optimizer = torch.optim.AdamW(factors.values(), lr=1e-2, weight_decay=1e-2)
    upper_optimizer = torch.optim.AdamW(upper.values(), lr=1e-3, weight_decay=1e-2)
    scheduler = model.noise_scheduler()
    for step, level in enumerate("lulululu"):  # four images in batches of two: an even number of batches an epoch
        batch = diffusion.draw(encoded, 2, 1000, seed=mix(run.seed_for("noise"), "instance"), step=step, device="cpu")
        weights = {}
        for name, weight in upper.items():
            module = name.removesuffix(".weight")
            down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            weights[name] = weight + factors[up] @ factors[down] if down in factors else weight
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        said = functional_call(model.unet, weights, (noisy, batch.timesteps, batch.embeddings)).sample
        loss = torch.nn.functional.mse_loss(said, batch.noise)
        trained = list((factors if level == "l" else upper).values())
        gradients = torch.autograd.grad(loss if level == "l" else -loss, trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        if profile == "released":
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        (lower_optimizer if level == "l" else upper_optimizer).step()

    moved = torch.cat([(ours[f"unet.{n}"] - model.parameters()[f"unet.{n}"]).flatten() for n in upper]).norm()
    apart = torch.cat([(ours[f"unet.{n}"] - upper[n]).flatten() for n in upper]).norm()
    assert apart < 1e-3 * moved
