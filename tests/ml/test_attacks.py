"""Every attack: which tensors it trains, what diffusers makes of it, and plain loops beside it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.contracts.attack import AttackedConcept, Budget
from harness.contracts.protection import Protection
from harness.core import registry
from harness.core.words import Words

SETTINGS = {
    "lora": {},
    "lora-alpha": {"alpha": 8.0},
    "lora-dora": {"variant": "dora"},
    "lora-loha": {"variant": "loha"},
    "lora-lokr": {"variant": "lokr"},
    "lora-oft": {"variant": "oft"},
    "lora-text": {"text_encoder": True},
    "lora-prior": {"prior_weight": 1.0},
    "dreambooth_lora": {},
    "dreambooth": {},
    "dreambooth-text": {"text_encoder": True},
    "dreambooth-alone": {"prior_weight": 0.0},
    "full_finetune": {},
    "textual_inversion": {},
    "textual_inversion-three": {"vectors": 3, "prompts": "captions"},
    "custom_diffusion": {"begin_as": "k"},
}
"""Parameters by attack, and by what is tried of it."""
WORDS = Words("sk purse", "sk", "purse")


def _make(case: str, **changes):
    cls = registry.get("attack", case.partition("-")[0])
    rate = 1e-3 if cls.name in ("dreambooth", "full_finetune") else 1e-2
    return cls(dataclasses.replace(cls.Parameters(), **{"learning_rate": rate, **SETTINGS[case], **changes}))


def _concept(attack, files, tiny_folder):
    called = attack.called(attack.parameters, WORDS)
    prior = tuple(sorted((tiny_folder / "cat").glob("*.png"))) if attack.prior_images(attack.parameters) else ()
    return AttackedConcept(
        "object", (f"a photo of {called}",) * len(files), files, WORDS, called, ("a cat",) * len(prior), prior
    )


def _adapt(
    case, model, run, files, tiny_folder, folder,
    *, steps=(2, 4), protection=None, attacker="honest", look=lambda: None, **changes,
):  # fmt: skip
    """Run an attack; return it and the folders of its checkpoints by step. `look` is called where each is saved."""
    attack = _make(case, **changes)
    concept = _concept(attack, files, tiny_folder)
    saved = {}
    for checkpoint in attack.adapt(model, concept, protection or Protection(), Budget(steps, 2, attacker), run):
        saved[checkpoint.step] = folder / f"{checkpoint.step}"
        saved[checkpoint.step].mkdir(parents=True)
        checkpoint.save(saved[checkpoint.step])
        look()
    return attack, saved


def _files(folder):
    """Return every tensor that a checkpoint holds."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def _draw(pipeline, prompt):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=2, output_type="np", generator=noise).images


@pytest.mark.parametrize("case", SETTINGS)
def test_a_checkpoint_loads_with_diffusers_alone_and_draws_the_same(
    case, model, make_run, purse_files, tiny_folder, tmp_path
):
    """A fresh pipeline with diffusers' own loaders gives the images that ours gives; unloading leaves no trace."""
    attack, saved = _adapt(case, model, make_run(), purse_files, tiny_folder, tmp_path)
    model.restore()
    called = attack.called(attack.parameters, WORDS)
    plain = _draw(model.pipeline, "a photo of sk purse")

    attack.load(model, saved[4])
    ours = _draw(model.pipeline, f"a photo of {called}")
    through_us = model.encode_text([f"a photo of {called}"])
    attack.unload(model)
    fresh, theirs = _by_diffusers(tiny_folder / "model", saved[4], called)

    assert abs(_draw(fresh, f"a photo of {called}") - ours).max() < 1e-5
    assert torch.allclose(theirs, through_us, atol=1e-6)
    assert abs(ours - plain).max() > 1e-4
    model.restore()
    assert model.is_restorable()
    assert abs(_draw(model.pipeline, "a photo of sk purse") - plain).max() == 0.0


def _by_diffusers(base, folder, called):
    """Return a pipeline made by diffusers alone from a checkpoint, and how it encodes a prompt."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    parts = {}
    if (folder / "unet").is_dir():
        parts["unet"] = UNet2DConditionModel.from_pretrained(folder / "unet")
    if (folder / "text_encoder").is_dir():
        parts["text_encoder"] = CLIPTextModel.from_pretrained(folder / "text_encoder")
    fresh = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, **parts)
    if (folder / "pytorch_lora_weights.safetensors").exists():
        fresh.load_lora_weights(folder)
    if (folder / "learned_embeds.safetensors").exists():
        fresh.load_textual_inversion(folder, weight_name="learned_embeds.safetensors")
    if (folder / "pytorch_custom_diffusion_weights.safetensors").exists():
        fresh.unet.load_attn_procs(
            folder, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=fresh
        )
    embeddings, _ = fresh.encode_prompt([f"a photo of {called}"], "cpu", 1, False)
    return fresh, embeddings.detach()


DECLARED = {
    "dreambooth": "unet.",
    "dreambooth-alone": "unet.",
    "dreambooth-text": ("unet.", "text_encoder."),
    "full_finetune": "unet.",
    "custom_diffusion": "unet.",
}
"""Where an attack changes the model's own weights; others leave every one as it is."""


@pytest.mark.parametrize("case", SETTINGS)
def test_only_the_declared_tensors_change(case, model, make_run, purse_files, tiny_folder, tmp_path):
    """Bit for bit; and what is declared does change."""
    before = {n: p.detach().clone() for n, p in model.parameters().items()}
    _adapt(case, model, make_run(), purse_files, tiny_folder, tmp_path)
    changed = {n for n, p in model.parameters().items() if not torch.equal(p, before[n])}

    if case not in DECLARED:
        assert not changed
    elif case == "custom_diffusion":
        assert changed == {n for n in before if ".attn2.to_k." in n or ".attn2.to_v." in n}
    else:
        wanted = {n for n in before if n.startswith(DECLARED[case])}
        assert changed <= wanted
        assert {n.partition(".")[0] for n in changed} == {n.partition(".")[0] for n in wanted}
        assert len(changed) > 0.9 * len(wanted)
    model.restore()
    assert model.is_restorable()
    assert all(torch.equal(p, before[n]) for n, p in model.parameters().items())


def test_an_empty_mask_and_one_that_is_ignored_are_full_fine_tuning_to_the_bit(
    model, make_run, purse_files, tiny_folder, tmp_path
):
    """FreezeAsGuard's m = 0, and what its protection is worth against an adaptive attacker."""
    half = frozenset(list(model.parameters())[::2])
    found = []
    for name, frozen, attacker in (("none", None, "honest"), ("empty", (), "honest"), ("ignored", half, "adaptive")):
        protection = None if frozen is None else Protection(frozen=frozenset(frozen))
        _, saved = _adapt(
            "full_finetune", model, make_run(1, name), purse_files, tiny_folder, tmp_path / name,
            protection=protection, attacker=attacker,
        )  # fmt: skip
        found.append(_files(saved[4]))
        model.restore()

    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(tensor, found[0][key]) for key, tensor in other.items())


def test_dreambooth_equals_a_plain_loop_with_diffusers(model, make_run, purse_files, tiny_folder, tmp_path):
    """Twenty losses with class images, written without our attack: the same draws give the same trajectory."""
    from PIL import Image

    from harness.core.seeds import mix
    from harness.training import diffusion

    run = make_run(3)
    losses = []
    run.track = lambda name, value, step: losses.append(value)
    _, saved = _adapt("dreambooth", model, run, purse_files, tiny_folder, tmp_path, steps=(20,))
    ours = _files(saved[20])
    model.restore()

    seed = run.seed_for("noise")
    own = diffusion.encode_images(
        model, run, [Image.open(f) for f in purse_files], ["a photo of sk purse"] * len(purse_files), flip=False
    )
    files = sorted((tiny_folder / "cat").glob("*.png"))
    prior = diffusion.encode_images(model, run, [Image.open(f) for f in files], ["a cat"] * len(files), flip=False)
    scheduler = model.noise_scheduler()
    trained = list(model.change(n for n in model.parameters() if n.startswith("unet.")).values())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    plain = []
    for step in range(20):
        parts = []
        for encoded, source in ((own, seed), (prior, mix(seed, "prior"))):
            batch = diffusion.draw(encoded, 2, 1000, seed=source, step=step, device="cpu")
            noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
            said = model.unet(noisy, batch.timesteps, batch.embeddings).sample
            parts.append(torch.nn.functional.mse_loss(said, batch.noise))
        (parts[0] + 1.0 * parts[1]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        plain.append(float(sum(parts).detach()) / 2)

    assert len(losses) == 20
    assert max(abs(a - b) / b for a, b in zip(losses, plain, strict=True)) < 1e-4
    theirs = {n: p.detach() for n, p in model.unet.named_parameters()}
    norm = torch.cat([t.flatten() for t in theirs.values()]).norm()
    gap = torch.cat([(ours[f"unet/diffusion_pytorch_model.safetensors/{n}"] - t).flatten() for n, t in theirs.items()])
    assert gap.norm() < 1e-5 * norm
    model.restore()


def test_class_images_that_are_weighed_must_be_there(model, make_run, purse_files, tiny_folder):
    """An error of the trial that says what is missing."""
    attack = _make("dreambooth")
    concept = dataclasses.replace(_concept(attack, purse_files, tiny_folder), prior_files=(), prior_captions=())
    with pytest.raises(ValueError, match="no class images"):
        next(iter(attack.adapt(model, concept, Protection(), Budget((1,), 2), make_run())))


def test_a_fully_frozen_model_is_an_error_of_the_trial(model, make_run, purse_files, tiny_folder, tmp_path):
    """Not a silent success."""
    frozen = Protection(frozen=frozenset(model.parameters()))
    with pytest.raises(ValueError, match="no weight is left"):
        _adapt("full_finetune", model, make_run(), purse_files, tiny_folder, tmp_path, protection=frozen)
