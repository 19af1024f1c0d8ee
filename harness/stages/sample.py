"""Evaluation images at every step asked for: images/<step>/<prompt>_<image>.png."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from harness.core import registry
from harness.stages.work import StageAtWork
from harness.store.layout import CHECKPOINTS, step_folder

if TYPE_CHECKING:
    from harness.contracts.protection import Protection


def draw(s: StageAtWork) -> None:
    """Draw the images, going on after a kill with the steps that are left."""
    from harness.model.sampling import sample

    described = s.stage.parameters
    settings = described["sampling"]
    model, protection = s.released()
    hooks = sampling_hooks(protection, described.get("attacker", "honest"))
    attack, checkpoints = None, None
    if "adapt" in s.stage.inputs:
        record = s.store.record("adapt", s.stage.inputs["adapt"])
        attack = registry.get("attack", record["identity"]["component"].partition("@")[0])(None)
        checkpoints = s.input("adapt", "adapt") / CHECKPOINTS
    saved = s.run.folder / "images"
    saved.mkdir(exist_ok=True)
    total = len(described["steps"]) * len(described["prompts"]) * settings["images_per_prompt"]
    done = 0
    for step in described["steps"]:
        final, temporary = saved / step_folder(step), saved / f".{step_folder(step)}"
        if final.is_dir():  # drawn before a kill
            done += len(list(final.iterdir()))
            continue
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if checkpoints is not None:
            attack.load(model, checkpoints / step_folder(step))
        try:
            with s.run.ledger.phase("sample"):
                for prompt, index, image in sample(
                    model, s.run, described["prompts"], settings,
                    images_per_prompt=settings["images_per_prompt"], seed=s.run.seed, hooks=hooks,
                ):  # fmt: skip
                    image.save(temporary / f"{prompt:03d}_{index:03d}.png")
                    done += 1
                    s.run.report(done, total)
        finally:
            if checkpoints is not None:
                attack.unload(model)
        temporary.rename(final)
    shutil.copytree(saved, s.folder / "images", copy_function=os.link)


def sampling_hooks(protection: Protection, attacker: str) -> list[Any]:
    """Return what the publisher runs before images are drawn; an adaptive attacker, who has the weights, does not."""
    from harness.contracts.hooks import make_hooks

    if attacker != "honest":
        return []
    return make_hooks("sampling_hook", protection.sampling)
