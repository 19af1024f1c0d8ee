"""A student beside its teacher in a test: the tiny model with and without noise on its UNet, and images to train on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from harness.contracts.defense import ProtectedConcept
from harness.core import pictures
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run

CAPTIONS = ("a dog on a beach", "an old house", "two cups", "a red car in the snow", "a lake")


class Images:
    """General pairs of files."""

    def __init__(self, files: tuple[Path, ...], captions: tuple[str, ...] = CAPTIONS):
        self.files, self.captions = files[: len(captions)], captions

    def image(self, index: int):
        """Return an image, RGB."""
        return pictures.read([self.files[index]])[0]


def student_of(source) -> DiffusionModel:
    """Return the model of a source with noise on every tensor of its UNet: a student with the teacher's widths."""
    model = DiffusionModel.load(source, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    own = {name: p for name, p in model.parameters().items() if name.startswith("unet.")}
    model.overlay({n: p + 0.02 * torch.randn(p.shape, generator=generator) for n, p in own.items()})
    return model


def lent(run: Run, source, files: tuple[Path, ...]) -> Run:
    """Return the run with a teacher and general pairs."""
    return dataclasses.replace(run, teacher=DiffusionModel.load(source, torch.device("cpu")), pairs=Images(files))


def concepts(folder: Path) -> list[ProtectedConcept]:
    """Return two concepts, of three images and of two."""
    files = {name: tuple(sorted((folder / name).glob("*.png"))) for name in ("purse", "cat")}
    return [
        ProtectedConcept("object", "purse", tuple(f"purse {i}" for i in range(3)), files["purse"][:3]),
        ProtectedConcept("object", "cat", ("a cat", "the cat"), files["cat"][:2]),
    ]


def adamw(unet: nn.Module, rate: float, warmup: int = 0):
    """Return AdamW as the released program has it, and diffusers' schedule of its rate."""
    from diffusers.optimization import get_constant_schedule_with_warmup

    optimizer = torch.optim.AdamW(unet.parameters(), rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    return optimizer, get_constant_schedule_with_warmup(optimizer, warmup)


def stepped(optimizer, schedule, loss) -> float:
    """Take a step of a plain loop; return the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    return float(loss.detach())


def lower_loss(unet: nn.Module, teacher: nn.Module, scheduler, batch) -> torch.Tensor:
    """Return the lower loss, written out with diffusers alone."""
    t = batch.timesteps
    abar = scheduler.alphas_cumprod[t]
    signal, spread = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
    noisy = signal * batch.latents + spread * batch.noise
    snr = abar / (1 - abar)
    if scheduler.config.prediction_type == "v_prediction":
        target, factor = signal * batch.noise - spread * batch.latents, snr + 1
    else:
        target, factor = batch.noise, snr
    weights = torch.minimum(factor, torch.full_like(factor, 5.0)) / factor
    own, blocks = _with_blocks(unet, noisy, t, batch.embeddings)
    with torch.no_grad():
        theirs, of_teacher = _with_blocks(teacher, noisy, t, batch.embeddings)
    denoising = sum(w * (p - q).square().mean() for w, p, q in zip(weights, own, target, strict=True)) / len(t)
    apart = sum((a - b).square().mean() for a, b in zip(blocks, of_teacher, strict=True))
    return denoising + 2.0 * (own - theirs).square().mean() + 0.1 / len(blocks) * apart


def _with_blocks(unet: nn.Module, noisy, timesteps, embeddings):
    """Return the prediction and the blocks' outputs: a pass written out, without hooks."""
    emb = unet.time_embedding(unet.time_proj(timesteps))
    hidden = unet.conv_in(noisy)
    skips, blocks = [hidden], []
    for block in unet.down_blocks:
        text = {"encoder_hidden_states": embeddings} if hasattr(block, "attentions") else {}
        hidden, more = block(hidden, emb, **text)
        skips += more
        blocks.append(hidden)
    hidden = unet.mid_block(hidden, emb, encoder_hidden_states=embeddings)
    blocks.append(hidden)
    for block in unet.up_blocks:
        text = {"encoder_hidden_states": embeddings} if hasattr(block, "attentions") else {}
        own, skips = tuple(skips[-len(block.resnets) :]), skips[: -len(block.resnets)]
        hidden = block(hidden, own, emb, **text)
        blocks.append(hidden)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden))), blocks


def upper_loss(unet: nn.Module, teacher: nn.Module, scheduler, batch, nothing) -> torch.Tensor:
    """Return the upper loss, written out with diffusers alone."""
    abar = scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * batch.latents + (1 - abar).sqrt() * batch.noise
    with torch.no_grad():
        empty = teacher(noisy, batch.timesteps, nothing.expand_as(batch.embeddings)).sample
        named = teacher(noisy, batch.timesteps, batch.embeddings).sample
    return (unet(noisy, batch.timesteps, batch.embeddings).sample - (2 * empty - named)).square().mean()


def apart(tensors, unet: nn.Module) -> float:
    """Return the greatest difference between released tensors and a plain loop's UNet."""
    own = dict(unet.named_parameters())
    assert tensors.keys() == {f"unet.{name}" for name in own}
    return max(float((tensors[f"unet.{name}"] - p.detach()).abs().max()) for name, p in own.items())
