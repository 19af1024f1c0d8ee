"""The LoRA attack: the losses of a plain loop, and an honest attacker who honours the publisher."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attacks.lora import Lora, Parameters
from harness.contracts.attack import AttackedConcept, Budget
from harness.contracts.hooks import AdaptationHook, HookSpec
from harness.contracts.protection import Protection
from harness.core.registry import register
from harness.training.selection import select


def _adapt(model, run, files, folder, *, steps=(2, 4), protection=None, attacker="honest", **changes):
    """Run the attack; return the folders of its checkpoints by step."""
    attack = Lora(dataclasses.replace(Parameters(), **({"learning_rate": 1e-2} | changes)))
    concept = AttackedConcept("object", ("a purse",) * len(files), files)
    saved = {}
    budget = Budget(tuple(steps), 2, attacker)
    for checkpoint in attack.adapt(model, concept, protection or Protection(), budget, run):
        saved[checkpoint.step] = folder / f"{checkpoint.step}"
        saved[checkpoint.step].mkdir(parents=True)
        checkpoint.save(saved[checkpoint.step])
    return saved


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_checkpoints_come_at_the_steps_asked_for(model, make_run, purse_files, tmp_path):
    """Two steps asked for, two adapters, and they differ."""
    saved = _adapt(model, make_run(), purse_files, tmp_path)
    early, late = _tensors(saved[2]), _tensors(saved[4])

    assert sorted(saved) == [2, 4]
    assert any(not torch.equal(early[n], late[n]) for n in early)


def test_losses_equal_a_plain_loop_with_diffusers_and_peft(model, make_run, purse_files, tmp_path):
    """Twenty steps: the same draws through a loop written without our attack have the same losses and adapter."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from PIL import Image

    from harness.training import diffusion

    run = make_run(3)
    losses, plain_losses = [], []
    run.track = lambda name, value, step: losses.append(value)
    ours = _tensors(_adapt(model, run, purse_files, tmp_path, steps=(20,))[20])

    images = [Image.open(f) for f in purse_files]
    encoded = diffusion.encode_images(model, run, images, ["a purse"] * 4, flip=True)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    torch.manual_seed(run.seed_for("adapter"))
    model.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    try:
        trained = [p for p in model.unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        scheduler = model.noise_scheduler()
        for step in range(20):
            batch = diffusion.draw(encoded, 2, 1000, seed=run.seed_for("noise"), step=step, device="cpu")
            noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
            said = model.unet(noisy, batch.timesteps, batch.embeddings).sample
            loss = torch.nn.functional.mse_loss(said, batch.noise)
            plain_losses.append(float(loss.detach()))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        named = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.unet))
        plain = {f"unet.{n}": t.detach().clone() for n, t in named.items()}
    finally:
        model.unet.unload_lora()
        model.unet.requires_grad_(False)

    norm = torch.cat([t.flatten() for t in plain.values()]).norm()
    assert max(abs(a - b) / b for a, b in zip(losses, plain_losses, strict=True)) < 1e-4
    assert plain.keys() == ours.keys()
    assert torch.cat([(plain[n] - ours[n]).flatten() for n in plain]).norm() < 1e-4 * norm


def test_honest_attacker_adapts_no_frozen_tensor(model, make_run, purse_files, tmp_path):
    """A module whose weight the publisher froze gets no adapter; the others do."""
    names = [n for n in select(model.parameters(), "attention") if n.endswith("weight")]
    frozen = frozenset(n for n in names if "down_blocks" in n)
    saved = _adapt(model, make_run(), purse_files, tmp_path, steps=(1,), protection=Protection(frozen=frozen))

    assert frozen
    assert not any("down_blocks" in n for n in _tensors(saved[1]))
    assert any("mid_block" in n for n in _tensors(saved[1]))


def test_attack_on_a_model_frozen_as_a_whole_says_so(model, make_run, purse_files, tmp_path):
    """Nothing to train is an error of the trial, not a silent success."""
    with pytest.raises(ValueError, match="left to adapt"):
        _adapt(model, make_run(), purse_files, tmp_path, protection=Protection(frozen=frozenset(model.parameters())))


@register("adaptation_hook")
class DropEverything(AdaptationHook):
    """A hook for the test below: no example counts."""

    name = "drop_everything"
    version = 1

    @dataclasses.dataclass(frozen=True)
    class Parameters:
        """No parameters."""

    def weigh(self, model, batch):
        return torch.zeros_like(batch.losses.detach())


def test_honest_attacker_runs_the_publishers_training_hooks(model, make_run, purse_files, tmp_path):
    """A hook that weighs every example zero leaves LoRA's B at zero."""
    hooked = Protection(adaptation=(HookSpec("drop_everything"),))
    saved = _adapt(model, make_run(), purse_files, tmp_path, steps=(2,), protection=hooked)
    ups = [t for n, t in _tensors(saved[2]).items() if "lora_B" in n or "lora.up" in n]

    assert ups and all(not t.any() for t in ups)


def test_preset_diffusers_clips_nothing_as_the_example(model, make_run, purse_files, tmp_path):
    """The example gives `clip_grad_norm_` the filter that its optimizer used up: also a limit of 1e-3 has no effect."""
    preset = dataclasses.replace(Parameters(), **Lora.presets["diffusers"])
    trained = _with_filter(model, make_run(3), purse_files, limit=1e-3)
    steps = {"steps": (6,), "learning_rate": 1e-2}
    ours = _tensors(_adapt(model, make_run(3), purse_files, tmp_path, clip_norm=preset.clip_norm, **steps)[6])
    clipped = _tensors(_adapt(model, make_run(3), purse_files, tmp_path / "clipped", clip_norm=1e-3, **steps)[6])
    norm = torch.cat([t.flatten() for t in trained.values()]).norm()

    assert preset.clip_norm is None
    assert torch.cat([(trained[n] - ours[n]).flatten() for n in ours]).norm() < 1e-4 * norm
    assert torch.cat([(clipped[n] - ours[n]).flatten() for n in ours]).norm() > 1e-3 * norm


def _with_filter(model, run, files, limit):
    """Train six steps with the example's own handling of `lora_layers`; return the adapter."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from PIL import Image

    from harness.training import diffusion

    encoded = diffusion.encode_images(model, run, [Image.open(f) for f in files], ["a purse"] * 4, flip=True)
    torch.manual_seed(run.seed_for("adapter"))
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    try:
        lora_layers = filter(lambda p: p.requires_grad, model.unet.parameters())
        optimizer = torch.optim.AdamW(lora_layers, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        scheduler = model.noise_scheduler()
        for step in range(6):
            batch = diffusion.draw(encoded, 2, 1000, seed=run.seed_for("noise"), step=step, device="cpu")
            noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
            said = model.unet(noisy, batch.timesteps, batch.embeddings).sample
            torch.nn.functional.mse_loss(said, batch.noise).backward()
            torch.nn.utils.clip_grad_norm_(lora_layers, limit)
            optimizer.step()
            optimizer.zero_grad()
        named = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.unet))
        return {f"unet.{n}": t.detach().clone() for n, t in named.items()}
    finally:
        model.unet.unload_lora()
        model.unet.requires_grad_(False)
