"""The setting for checking a property: a small model, three concepts with images, general images with captions, and a
folder for runs. Plain data.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.conformance.interruption import KillableRun, Kills
from harness.core import parameters
from harness.core.errors import UserMistake
from harness.model.source import ModelSource

if TYPE_CHECKING:
    from PIL.Image import Image

    from harness.contracts.method import Method
    from harness.model.pipeline import DiffusionModel

EPSILON, VELOCITY = "epsilon", "v_prediction"
NAMES = ("purse", "lamp", "cat")
CLASS_PROMPT = "an object"
OWN, PRIOR = 4, 2
"""Number of images of each concept, and of its class."""
GENERAL = "general"
"""The folder of general images; there are as many as of a concept."""
_global_seeds = itertools.count(1)


@dataclass(frozen=True)
class GeneralImages:
    """Images that name no concept, with captions: `harness.model.run.Pairs`."""

    files: tuple[Path, ...]
    captions: tuple[str, ...]  # one an image

    def image(self, index: int) -> Image:
        """Return an image, RGB."""
        from harness.core import pictures

        return pictures.read([self.files[index]])[0]


@dataclass(frozen=True)
class Setting:
    """A small model and what to train it on; it can be sent to another process."""

    source: ModelSource
    folder: Path  # exists; contains images/, and a folder for each run
    prediction: str | None = None  # declared prediction type of its weights: EPSILON | VELOCITY; None: the true type
    plugins: tuple[str, ...] = ()  # files that register the methods, for other processes
    precision: str = "fp32"  # of runs

    @classmethod
    def make(cls, source: ModelSource, folder: Path, plugins: tuple[str, ...] = ()) -> Setting:
        """Return a setting in an existing folder, with generated images: different noise for each concept."""
        for number, name in enumerate((*NAMES, "class", GENERAL)):
            _write_noise(folder / "images" / name, PRIOR if name == "class" else OWN, seed=number)
        return cls(source, folder, None, plugins)

    def predicting(self, prediction: str) -> Setting:
        """Return the same setting with another declared prediction type of the weights."""
        return replace(self, prediction=prediction)

    def computing_in(self, precision: str) -> Setting:
        """Return the same setting with runs in another precision."""
        return replace(self, precision=precision)

    def images(self, name: str) -> tuple[Path, ...]:
        """Return the images of a concept, of "class" or of GENERAL."""
        return tuple(sorted((self.folder / "images" / name).glob("*.png")))

    def prior_images(self, count: int) -> tuple[Path, ...]:
        """Return `count` images of the class, repeating the few different ones."""
        return tuple(itertools.islice(itertools.cycle(self.images("class")), count))

    def pairs(self) -> GeneralImages:
        """Return general images with captions."""
        files = self.images(GENERAL)
        return GeneralImages(files, tuple(f"scene number {index}" for index in range(len(files))))

    def drawn(self, prompts: tuple[str, ...]) -> GeneralImages:
        """Return an image for each prompt, repeating the few different ones."""
        files = itertools.islice(itertools.cycle(self.images(GENERAL)), len(prompts))
        return GeneralImages(tuple(files), prompts)

    def model(self) -> DiffusionModel:
        """Return the released model, newly loaded, on the CPU.

        The process's global random state is different each time, since nothing may depend on it.
        """
        import torch
        from transformers.utils import logging

        from harness.model.pipeline import DiffusionModel

        logging.disable_progress_bar()
        model = DiffusionModel.load(self.source, torch.device("cpu"))
        if self.prediction is not None:
            scheduler = model.pipeline.scheduler
            model.pipeline.scheduler = type(scheduler).from_config(
                scheduler.config, prediction_type=self.prediction
            )
            model = DiffusionModel(model.pipeline, model.device)
        torch.manual_seed(next(_global_seeds))
        return model

    def run_folder(self) -> Path:
        """Return a new, empty folder."""
        return Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))

    def run(self, seed: int | None = 1, folder: Path | None = None, kills: Kills | None = None) -> KillableRun:
        """Return the run of a stage, which saves a state at every opportunity."""
        import torch

        return KillableRun(
            seed,
            torch.device("cpu"),
            self.precision,
            folder or self.run_folder(),
            checkpoint_interval_s=0.0,
            kills=kills or Kills(),
        )


def small(cls: type[Method], given: Mapping[str, Any] | None = None, preset: str | None = None) -> Any:
    """Return a method with its cheap parameter values (`Method.quick`), overridden by the given ones.

    Raises UserMistake for invalid values.
    """
    values, mistakes = parameters.resolve(cls, {**cls.quick, **(given or {})}, preset)
    if mistakes:
        raise UserMistake([f"{cls.name}: {name + ': ' if name else ''}{message}" for name, message in mistakes])
    return cls(values)


def _write_noise(folder: Path, count: int, *, seed: int) -> None:
    """Write `count` images of noise as PNG."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{index:03d}.png")
