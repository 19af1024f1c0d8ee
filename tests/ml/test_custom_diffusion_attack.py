"""Custom Diffusion's steps beside the diffusers example's loss, weight of class images and clipping, written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from attacks.custom_diffusion import CustomDiffusion, Parameters
from harness.contracts.attack import AttackedConcept, Budget
from harness.contracts.protection import Protection
from harness.core.seeds import mix
from harness.training import diffusion
from harness.training.selection import select
from harness.training.token_embedding import LearnedWord

STEPS, RATE = 8, 1e-2


def _steepen(model):
    """Multiply the UNet's last weights, so that the tiny model's gradients exceed the limit of 1 at some steps."""
    with torch.no_grad():
        for weight in model.change(["unet.conv_out.weight"]).values():
            weight.mul_(6)


def _changes(model, before):
    return {name: model.parameters()[name].detach() - tensor for name, tensor in before.items()}


def _example(model, run, files, prior_files, names):
    """Train as `train_custom_diffusion.py` does: prior_loss_weight 1, max_grad_norm 1, a mask of ones."""
    word = LearnedWord(model, "k", 1, "<new1>")
    own = diffusion.encode_images(
        model, run, [Image.open(f) for f in files], ["a <new1> purse"] * len(files), flip=True, text=word
    )
    prior = diffusion.encode_images(
        model, run, [Image.open(f) for f in prior_files], ["a cat"] * len(prior_files), flip=True
    )
    scheduler = model.noise_scheduler()
    trained = [*model.change(names).values(), word.vectors]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    seed = run.seed_for("noise")
    norms = []
    for step in range(STEPS):
        losses = []
        for encoded, source in ((own, seed), (prior, mix(seed, "prior"))):
            batch = diffusion.draw(encoded, 2, 1000, seed=source, step=step, device="cpu")
            text = word.encode(batch.embeddings) if encoded is own else batch.embeddings
            noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
            said = model.unet(noisy, batch.timesteps, text).sample
            losses.append(torch.nn.functional.mse_loss(said, batch.noise, reduction="none"))
        mask = torch.ones_like(losses[0][:, :1])
        instance = ((losses[0] * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
        (instance + 1.0 * losses[1].mean()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.fixture
def apart(model, make_run, purse_files, tiny_folder):
    """Return a function: the relative distance of our attack's update, with changed parameters, from the example's."""
    prior = tuple(sorted((tiny_folder / "cat").glob("*.png")))
    names = select(model.parameters(), "cross_attention_kv")
    before = {name: model.parameters()[name].detach().clone() for name in names}
    _steepen(model)
    norms = _example(model, make_run(3), purse_files, prior, names)
    theirs = _changes(model, before)
    model.restore()

    def distance(**changed) -> float:
        parameters = dataclasses.replace(Parameters(), learning_rate=RATE, begin_as="k", **changed)
        concept = AttackedConcept(
            "object", ("a <new1> purse",) * len(purse_files), purse_files, None, "<new1> purse", ("a cat",) * 6, prior
        )
        attack = CustomDiffusion(parameters)
        _steepen(model)
        for _ in attack.adapt(model, concept, Protection(), Budget((STEPS,), 2), make_run(3)):
            ours = _changes(model, before)
        model.restore()
        gap = torch.cat([(ours[n] - theirs[n]).flatten() for n in names]).norm()
        return float(gap / torch.cat([t.flatten() for t in theirs.values()]).norm())

    distance.norms = norms
    return distance


def test_defaults_update_as_the_example_does(apart):
    """Its loss is four times ours: L' = 4 (L + L_prior / 4), so that |grad L'| <= 1 is |grad (L + L_prior / 4)| <= 1/4.

    What remains is AdamW's epsilon. Clipping to 1, as the parameter's name suggests, is another attack.
    """
    assert max(apart.norms) > 1  # the limit is reached
    assert apart() < 1e-3
    assert apart(clip_norm=1.0) > 1e-2
