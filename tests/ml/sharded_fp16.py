"""One process of `test_sharded_fp16`: `python -m tests.ml.sharded_fp16 FOLDER`, started as one and as two.

It trains the tiny UNet in fp16 under each setting of this number of processes. The last process of a group has a loss
so large that its gradient alone overflows at first, and at one step a forward pass that overflows. What is trained is
in FOLDER/<setting>.safetensors, what each process counted in FOLDER/<setting>.<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from harness.core.sharding import Sharding
from harness.model.loss_scale import LARGEST
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run, World
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from harness.training import sharding
from harness.training.loop import StepOver, train
from harness.training.weights import Level

STEPS, BATCH, LOST = 20, 4, 6
SETTINGS = {
    "none": Sharding(),
    "zero0": Sharding(2, 0),
    "zero2": Sharding(2, 2),
    "zero3": Sharding(2, 3),
    "zero3_offload": Sharding(1, 3, "cpu"),
}


def trained(folder: Path, name: str, world: World) -> None:
    """Train under a setting, and write what came out."""
    source = resolve_model(ModelSpec(id=str(folder / "model")), "test", folder)
    model = DiffusionModel.load(source, torch.device("cpu"))
    work = folder / f"{name}.{world.rank}"
    work.mkdir()
    run = Run(1, torch.device("cpu"), "fp16", work, sharding=SETTINGS[name], world=world)
    run.loss_scale.scale = LARGEST
    names = tuple(n for n in model.parameters() if n.startswith("unet.") and "attn2" in n)
    level = Level(names, 1e-3)
    weights = sharding.spread(model, model.change(names), {"all": level}, run)

    def step(index: int) -> dict[str, float]:
        source = torch.Generator().manual_seed(index)
        latents, noise = torch.randn(2, BATCH, 4, 8, 8, generator=source)
        latents[-1] *= 1e6 if index == LOST else 1.0  # the last example is the last process's
        embeddings = torch.randn(BATCH, 7, 32, generator=source)
        times = torch.randint(1000, (BATCH,), generator=source)
        share = BATCH // world.size
        own = slice(world.rank * share, (world.rank + 1) * share)
        large = torch.ones(BATCH)
        large[-1] = 100.0

        def loss():
            with run.autocast():
                said = model.denoise(latents[own], times[own], embeddings[own])
            return (large[own] * (said.float() - noise[own]).square().flatten(1).mean(1)).mean()

        weights.step("all", weights.gradient([loss], names))
        return {}

    train(run, StepOver(step, weights), STEPS, "a test")
    whole = weights.collected(weights.read(names))
    if world.rank == 0:
        save_file({n: t.detach().contiguous() for n, t in whole.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.{world.rank}.json").write_text(json.dumps(run.ledger.numbers), encoding="utf-8")


def main(folder: Path) -> None:
    """Train under the settings of this number of processes."""
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    with sharding.joined(torch.device("cpu")) as world:
        for name, setting in SETTINGS.items():
            if setting.workers == size:
                trained(folder, name, world)
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
