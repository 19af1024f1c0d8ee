"""One process of `test_sharded_resume`: `python -m tests.ml.sharded_resume FOLDER`, started as one and as two.

It trains HALF the steps under each setting of this number of processes, and all steps undisturbed in one process. When
all have done so, it does the other half of all pairs whose second setting has this number. States are in
FOLDER/<learner>.<setting>, the end of a pair in FOLDER/<learner>.<from>.<to>.safetensors, the undisturbed one in
FOLDER/<learner>.whole.safetensors, and what is different right after loading in FOLDER/wrong.<processes>.json.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from defenses.pruning import bilevel
from harness.core.sharding import Sharding
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run, World
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from harness.training import sharding
from harness.training.loop import StepOver, train
from harness.training.masking import MaskedWeights, MaskRule
from harness.training.weights import Level
from tests.ml import students

HALF, STEPS, BATCH = 3, 6, 4
SETTINGS = {
    "none": Sharding(),
    "zero0": Sharding(2, 0),
    "zero1": Sharding(2, 1),
    "zero2": Sharding(2, 2),
    "zero3": Sharding(2, 3),
    "zero2_offload": Sharding(1, 2, "cpu"),  # one process, as somebody without a second GPU would
    "zero3_offload": Sharding(1, 3, "cpu"),
}
LEARNERS = {
    "levels": [
        *itertools.permutations(("none", "zero0", "zero2", "zero3"), 2),
        ("none", "zero2_offload"), ("zero2_offload", "zero1"), ("zero1", "zero3_offload"), ("zero3_offload", "none"),
    ],
    "masked_fp32": [("none", "zero3"), ("zero3", "zero2"), ("zero2", "none")],
    "masked_bf16": [("none", "zero3"), ("zero3", "none")],
    "second_student": [("none", "zero3"), ("zero3", "zero2"), ("zero2", "none")],
}  # fmt: skip
"""By what is trained: (setting of the first half, of the second half)."""


def trained(folder: Path, work: Path, learner: str, setting: str, world: World, steps: int) -> Learner:
    """Train to `steps`, from the state in `work` if there is one; the state at the end is saved there."""
    source = resolve_model(ModelSpec(id=str(folder / "model")), "test", folder)
    model = DiffusionModel.load(source, torch.device("cpu"))
    run = Run(1, torch.device("cpu"), "fp32", work, sharding=SETTINGS[setting], world=world, keeps_end=True)
    if learner == "second_student":
        run = students.lent(run, source, tuple(sorted((folder / "purse").glob("*.png"))))
    kinds = {"levels": Levels, "masked_fp32": Masked, "masked_bf16": Masked, "second_student": Students}
    made = kinds[learner](model, run, learner)
    train(run, StepOver(made.step, made), steps, "a test's training")
    return made


class Learner:
    """A UNet and a loss whose batch the processes share. It notes tensors that are not loaded as they were saved."""

    wrong: Sequence[str] | None = None

    def __init__(self, model: DiffusionModel, run: Run):
        self.model, self.run = model, run

    def state(self):
        """Return the state of what is trained."""
        return self.moved.state()

    def load_state(self, state) -> None:
        """Load it and save it again at once; compare to the bit."""
        self.moved.load_state(state)
        found = self.moved.state()
        if self.run.world.rank == 0:
            names = {*state, *found}
            self.wrong = sorted(n for n in names if n not in found or not torch.equal(state[n], found[n]))

    def losses(self, index: int):
        """Return the loss of this process's share of a batch.

        It is small, so that rounding where a gradient is zero is below AdamW's eps.
        """
        source = torch.Generator().manual_seed(index)
        latents, noise = torch.randn(2, BATCH, 4, 8, 8, generator=source)
        embeddings = torch.randn(BATCH, 7, 32, generator=source)
        times = torch.randint(1000, (BATCH,), generator=source)
        own = slice(self.run.world.rank, None, self.run.world.size)

        def loss():
            predicted = self.model.denoise(latents[own], times[own], embeddings[own])
            return 1e-2 * (predicted - noise[own]).square().mean()

        return [loss]

    def start(self):
        """Return the UNet's weights by name."""
        return {name: p for name, p in self.model.parameters().items() if name.startswith("unet.")}


class Levels(Learner):
    """AdamW on two levels that share weights, and SGD with momentum on a third, in turn."""

    def __init__(self, model: DiffusionModel, run: Run, kind: str):
        super().__init__(model, run)
        parameters = self.start()
        names = list(parameters)
        third = len(names) // 3
        levels = {
            "lower": Level(tuple(names[: 2 * third]), 1e-3, 1e-2),
            "upper": Level(tuple(names[third : 2 * third]), 1e-3, clip_norm=1e-3),
            "along": Level(tuple(names[2 * third :]), 1.0, momentum=0.9),
        }
        self.moved = sharding.spread(model, model.change(list(parameters)), levels, run)

    def step(self, index: int) -> dict[str, float]:
        """Step one level."""
        level = list(self.moved.levels)[index % 3]
        self.moved.step(level, self.moved.gradient(self.losses(index), self.moved.levels[level].names))
        return {"norm": 1.0}


class Masked(Learner):
    """The mask and the simulated user's AdamW of FreezeAsGuard."""

    def __init__(self, model: DiffusionModel, run: Run, kind: str):
        super().__init__(model, run)
        names = list(self.start())
        source = torch.Generator().manual_seed(3)
        finetuned = {n: p + 0.01 * torch.randn(p.shape, generator=source) for n, p in self.start().items()}
        weights = sharding.spread(model, model.use_up(names), sharding.no_levels(names), run)
        dtype = torch.bfloat16 if kind == "masked_bf16" else torch.float32
        self.moved = MaskedWeights(
            weights, finetuned, (torch.rand(len(names), generator=source) - 0.5).to(dtype),
            MaskRule(0.3, 0.2, 0.3, 50.0, "adam"), user_learning_rate=1e-3, user_optimizer="adamw", delta_dtype=dtype,
        )  # fmt: skip

    def step(self, index: int) -> dict[str, float]:
        """Take a step of the mask or of the user."""
        slope = self.moved.weights.gradient(self.losses(index), self.moved.names)
        if index % 2:
            self.moved.user_step(slope)
        else:
            self.moved.mask_step(slope)
        return {"norm": 1.0}


class Students(Learner):
    """Two students in turn: the bilevel fine-tuning of the paper, with an outer step after each inner one."""

    def __init__(self, model: DiffusionModel, run: Run, kind: str):
        super().__init__(model, run)
        p = bilevel.Parameters(
            profile="paper", lower_steps=1, steps=STEPS, batch_size=BATCH, lower_learning_rate=1e-3,
            upper_learning_rate=1e-3,
        )  # fmt: skip
        self.moved = bilevel._Penalty(p, model, students.concepts(run.folder.parent), run)

    def step(self, index: int) -> dict[str, float]:
        """Take a step of one of them."""
        return self.moved.step(index)


def main(folder: Path) -> None:
    """Do all settings, then all pairs, of this number of processes."""
    torch.set_num_threads(1)
    count = int(os.environ["WORLD_SIZE"])
    wrong: dict[str, Sequence[str] | None] = {}
    with sharding.joined(torch.device("cpu")) as group:
        for learner in LEARNERS if count == 1 else ():  # first, as ZeRO 3 replaces a function of torch
            _train(folder, f"{learner}.whole", learner, "none", World(), STEPS)
        for learner, pairs in LEARNERS.items():
            for start in dict.fromkeys(start for start, _ in pairs if SETTINGS[start].workers == count):
                _train(folder, f"{learner}.{start}", learner, start, _world(start, group), HALF)
        _wait_for_all(folder, group)
        for learner, start, to in ((learner, *pair) for learner, pairs in LEARNERS.items() for pair in pairs):
            if SETTINGS[to].workers == count:
                name = f"{learner}.{start}.{to}"
                if group.rank == 0:
                    shutil.copytree(folder / f"{learner}.{start}", folder / name)
                group.wait()
                wrong[name] = _train(folder, name, learner, to, _world(to, group), STEPS).wrong
        if group.rank == 0:
            (folder / f"wrong.{count}.json").write_text(json.dumps(wrong), encoding="utf-8")
        group.wait()
    os._exit(0)


def _wait_for_all(folder: Path, group: World) -> None:
    """Wait until one process and two processes have saved their states; the test ends all when one fails."""
    if group.rank == 0:
        (folder / f"saved.{group.size}").touch()
        while not all((folder / f"saved.{count}").exists() for count in (1, 2)):
            time.sleep(0.1)
    group.wait()


def _world(setting: str, group: World) -> World:
    return group if SETTINGS[setting].needs_deepspeed else World()


def _train(folder: Path, name: str, learner: str, setting: str, world: World, steps: int) -> Learner:
    """Train in FOLDER/<name>, and save everything at the end in a file beside it."""
    work = folder / name
    work.mkdir(exist_ok=True)
    done = trained(folder, work, learner, setting, world, steps)
    state = done.state()
    if world.rank == 0:
        save_file({n: t.contiguous() for n, t in state.items()}, folder / f"{name}.safetensors")
    return done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
