"""A mask step and a user step of FreezeAsGuard: ours against the released loop, re-enacted, side by side on a CPU.

    python -m tests.benchmarks.mask_update

The re-enactment follows the facts sheet (freezeasguard.md, sections 3 and 11): images are read, encoded by the VAE and
captions by the text encoder at each step; gradients are kept on every tensor; the mask and the weights move in a Python
loop over tensors that takes scalars out of the logits, copies them and writes them back one by one; Delta is a second
UNet, in bf16. Ours keeps Delta in bf16 too. On the testbed's UNet (208 tensors), and on one with the 686 tensors of SD
1.x at a sixteenth of its width, where the loop over tensors weighs more beside the passes. A process a measurement;
memory is the peak above the loaded model, Delta among it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = ("testbed", "686 tensors, narrow")
SIDES = ("released", "ours")
STEPS = ("mask", "user")
IMAGES = 12
TEMPERATURE, MASK_RATE, SPARSITY, RATIO, USER_RATE = 0.2, 10.0, 5e3, 0.2, 1e-5


def main() -> None:
    """Measure every model, step and side, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="timed steps; the first two more are not")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, each side in turn; the fastest counts")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_measure(*given.one, given.steps, given.batch_size)))
        return
    print(f"CPU, batch {given.batch_size}, {given.steps} steps, best of {given.rounds}")
    print("| UNet | step | s / step, released | ours | time ratio | memory, released, MB | ours | memory ratio |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for model in MODELS:
        for step in STEPS:
            found = {side: [] for side in SIDES}
            for _ in range(given.rounds):
                for side in SIDES:
                    command = [sys.executable, "-m", "tests.benchmarks.mask_update", "--one", model, step, side]
                    command += ["--steps", str(given.steps), "--batch-size", str(given.batch_size)]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    found[side].append(json.loads(done.stdout.splitlines()[-1]))
            theirs, ours = (
                {name: min(each[name] for each in found[side]) for name in ("seconds", "memory")} for side in SIDES
            )
            print(
                f"| {model} | {step} | {theirs['seconds']:.3f} | {ours['seconds']:.3f} | "
                f"{ours['seconds'] / theirs['seconds']:.2f} | {theirs['memory'] / 1e6:,.0f} | "
                f"{ours['memory'] / 1e6:,.0f} | {ours['memory'] / theirs['memory']:.2f} |",
                flush=True,
            )


def _measure(name: str, kind: str, side: str, steps: int, batch_size: int) -> dict[str, float]:
    import torch

    from harness.model.run import Run
    from harness.stages.workplace import peak_memory_bytes, reset_peak_memory
    from tests.benchmarks.bilevel import _resident_bytes

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        model = _model(name, Path(folder))
        illegal, innocent = _concepts(model, Path(folder))
        run = Run(0, device, "fp32", Path(folder))
        reset_peak_memory()
        idle = _resident_bytes()
        make = {"released": _released, "ours": _ours}[side]
        step = make(model, run, illegal, innocent, kind, batch_size)
        clock = []
        for index in range(2 + steps):
            if index == 2:
                clock.append(time.perf_counter())
            step(index)
        clock.append(time.perf_counter())
        return {"seconds": (clock[1] - clock[0]) / steps, "memory": peak_memory_bytes(device) - idle}


def _model(name: str, folder: Path):
    """Return the testbed's model, or a tiny one with a UNet of SD 1.x's 686 tensors."""
    import torch

    from harness.model.pipeline import DiffusionModel
    from harness.model.source import resolve_model
    from harness.suite.spec import ModelSpec
    from tests import tiny

    device = torch.device("cpu")
    if name == "testbed":
        return DiffusionModel.load(resolve_model(ModelSpec(id="testbed"), "benchmark", folder), device)
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    tiny.save_pipeline(folder / "model")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(20, 40, 80, 80), cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=4,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder / "model", unet=unet, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return DiffusionModel(pipeline, device)


def _concepts(model, folder: Path):
    """Return an illegal and an innocent concept of images of noise."""
    import numpy as np
    from PIL import Image

    from harness.contracts.defense import ProtectedConcept

    source = np.random.default_rng(0)
    size = (model.image_size, model.image_size, 3)
    found = []
    for name in ("purse", "lamp"):
        files = []
        for index in range(IMAGES):
            files.append(folder / f"{name}{index}.png")
            Image.fromarray(source.integers(0, 256, size, dtype=np.uint8)).save(files[-1])
        found.append(ProtectedConcept("object", name, (f"a picture of a {name}",) * IMAGES, tuple(files)))
    return found


def _fine_tuned(parameters):
    """Return weights a little off those given, for theta_ft."""
    import torch

    source = torch.Generator().manual_seed(1)
    return {n: p.detach() + 1e-3 * torch.randn(p.shape, generator=source) for n, p in parameters.items()}


def _ours(model, run, illegal, innocent, kind: str, batch_size: int):
    import torch

    from harness.training import sharding
    from harness.training.domains import Domains
    from harness.training.masking import MaskedWeights, MaskRule
    from harness.training.selection import select

    names = select(model.parameters(), "unet")
    theta = model.use_up(names)
    domains = Domains(
        model, run, [illegal], [innocent], batch_size=batch_size, flip=False, seed=0, is_mixed=True
    )
    masked = MaskedWeights(
        sharding.spread(model, theta, sharding.no_levels(names), run),
        _fine_tuned(theta),
        torch.rand(len(names), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        MaskRule(RATIO, TEMPERATURE, MASK_RATE, SPARSITY),
        user_learning_rate=USER_RATE,
        delta_dtype=torch.bfloat16,
    )

    def step(index: int) -> None:
        if kind == "mask":
            masked.mask_step(masked.weights.gradient(domains.losses(index, -0.5, 0.5), names))
        else:
            masked.user_step(masked.weights.gradient(domains.mean(index), names))

    return step


def _released(model, run, illegal, innocent, kind: str, batch_size: int):
    import torch

    from harness.core import pictures
    from harness.training.diffusion import pixels

    unet, scheduler = model.unet, model.noise_scheduler()
    start = dict(unet.named_parameters())
    fine_tuned = _fine_tuned(start)
    model.use_up([])
    difference = copy.deepcopy(unet)
    logits = torch.rand(len(start), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        for i, (name, apart) in enumerate(difference.named_parameters()):
            apart.data -= fine_tuned[name]
            start[name].data = fine_tuned[name] + apart * torch.sigmoid(logits[i].float() / TEMPERATURE)
    del fine_tuned
    difference.to(torch.bfloat16)
    unet.requires_grad_(True)
    files, captions = [*illegal.files, *innocent.files], [*illegal.captions, *innocent.captions]

    def losses(index: int):
        source = torch.Generator().manual_seed(index)
        chosen = torch.randint(len(files), (batch_size,), generator=source).tolist()
        with torch.no_grad():
            images = pixels(pictures.read([files[i] for i in chosen]), model.image_size)
            latents = model.vae.encode(images).latent_dist.sample() * model.vae.config.scaling_factor
            text = model.encode_text([captions[i] for i in chosen])
        noise = torch.randn(latents.shape, generator=source)
        timesteps = torch.randint(1000, (batch_size,), generator=source)
        said = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text, return_dict=False)[0]
        return (said - noise).square().mean(dim=[1, 2, 3]), torch.tensor([float(i < IMAGES) for i in chosen])

    def mask_step(index: int) -> None:
        each, is_illegal = losses(index)
        of_illegal = (each * is_illegal).sum() / (is_illegal.sum() + 1e-5)
        of_innocent = (each * (1 - is_illegal)).sum() / ((1 - is_illegal).sum() + 1e-5)
        ((of_innocent - of_illegal) / 2).backward()
        leaf = logits.detach().clone().requires_grad_(True)
        sparse = (RATIO - torch.sigmoid(leaf / TEMPERATURE).mean()).square()
        held_back = SPARSITY * torch.autograd.grad(sparse, leaf)[0]
        for i, (apart, parameter) in enumerate(zip(difference.parameters(), unet.parameters(), strict=True)):
            m = torch.sigmoid(logits[i] / TEMPERATURE)
            pull = MASK_RATE * torch.sum(apart.data * parameter.grad) * m * (1 - m) / TEMPERATURE
            before = copy.deepcopy(logits.data[i])
            logits.data[i] = logits.data[i] - pull - held_back[i]
            moved = torch.sigmoid(logits[i] / TEMPERATURE) - torch.sigmoid(before / TEMPERATURE)
            parameter.data += apart.data * moved
        for parameter in unet.parameters():
            parameter.grad = None

    def user_step(index: int) -> None:
        losses(index)[0].mean().backward()
        for i, (apart, parameter) in enumerate(zip(difference.parameters(), unet.parameters(), strict=True)):
            m = torch.sigmoid(logits[i] / TEMPERATURE)
            down = -USER_RATE * (1 - m) * parameter.grad
            parameter.data += down * (1 - m)
            apart.data -= down
        for parameter in unet.parameters():
            parameter.grad = None

    return mask_step if kind == "mask" else user_step


if __name__ == "__main__":
    main()
