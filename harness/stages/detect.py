"""Detectors at work: scores.json, one value a prompt, from a kept trajectory, from drawn images, or from the model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.contracts.detector import Detector
from harness.contracts.stage import StageKind
from harness.core import pictures
from harness.core.described import Described
from harness.core.errors import one_line
from harness.core.registry import register
from harness.core.sampling import Sampling
from harness.core.seeds import mix
from harness.stages import replay
from harness.stages.sample import refuse_sampling_hooks
from harness.stages.work import StageAtWork
from harness.store.layout import SCORES, step_folder

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class DetectParameters:
    """A detector's own parameters, and what it is asked about."""

    parameters: Described
    prompts: tuple[str, ...]
    sampling: Sampling
    latents: Literal["per_prompt", "shared"]  # as for `replay`
    prediction: Literal["epsilon", "model"]


@register("stage")
class Detect(StageKind):
    """Score prompts by one detector."""

    name = "detect"
    version = 1
    method_kind = "detector"
    after = ("replay",)
    Parameters = DetectParameters

    @classmethod
    def prompts(cls, parameters: DetectParameters) -> Sequence[str]:
        """Return the prompts."""
        return parameters.prompts

    def do(self, parameters: DetectParameters, work: StageAtWork) -> None:
        """Write one value a prompt."""
        detector: Detector = work.method()
        name = detector.name
        seen = _OfModel(parameters, work) if detector.reads == "model" else _OfReplay(parameters, work, detector)
        values = []
        with work.run.ledger.phase("detect"):
            for prompt, given in enumerate(detector.score(seen)):
                value = float(given)
                if not math.isfinite(value):
                    raise ValueError(f"{name} is {value} for '{one_line(parameters.prompts[prompt], 60)}'")
                values.append({"step": 0, "prompt": prompt, "value": value})
                work.run.report(prompt + 1, len(parameters.prompts))
        if len(values) != len(parameters.prompts):
            raise ValueError(f"{name} gave {len(values)} scores for {len(parameters.prompts)} prompts")
        if len(values) > 1 and len({each["value"] for each in values}) == 1:
            work.run.notify(f"{name} is {values[0]['value']:g} for all {len(values)} prompts: it separates nothing")
        sampling = parameters.sampling
        used = len(detector.steps(detector.parameters, sampling.steps))
        images = detector.images_used(detector.parameters, sampling.images_per_prompt)
        about = {
            "direction": "none",
            "unit": detector.unit,
            "range": f"{detector.range[0]:g}..{detector.range[1]:g}",
            "backbone": "",
            "preprocessing": f"{used} of {sampling.steps} steps, {images} of {sampling.images_per_prompt} images, "
            f"latents {parameters.latents}, prediction {parameters.prediction}",
            "library": "",
        }
        (work.folder / SCORES).write_text(json.dumps({"about": about, "values": values}), encoding="utf-8")


class _OfReplay:
    """What a detector sees of a drawing that was kept (`harness.contracts.detector.Seen`)."""

    def __init__(self, parameters: DetectParameters, work: StageAtWork, detector: Detector):
        self._folder, self._reads = work.input("replay"), detector.reads
        self._reads_ending = detector.reads_ending
        self.prompts = parameters.prompts
        self.images_per_prompt = parameters.sampling.images_per_prompt
        self.timesteps = replay.timesteps(self._folder)

    def predictions(self, prompt: int) -> tuple[Tensor, Tensor]:
        """Return (for the prompt, for no text), each [images, steps, channels, height, width]."""
        if self._reads != "predictions":
            raise ValueError("a detector that uses predictions declares reads = 'predictions'")
        return replay.read(self._folder, prompt)

    def ending(self, prompt: int) -> Tensor:
        """Return the attention to the prompt's end token, [images, height, width]."""
        if not self._reads_ending:
            raise ValueError("a detector that uses the attention to the end token declares reads_ending = True")
        return replay.ending(self._folder, prompt)

    def images(self, prompt: int) -> list[Image]:
        """Return the drawn images of a prompt."""
        return pictures.read(sorted((self._folder / "images" / step_folder(0)).glob(f"{prompt:03d}_*.png")))

    def start(self, prompt: int) -> Tensor:
        """Refuse: there is no model."""
        raise ValueError("a detector that asks the model declares reads = 'model'")

    def predict(self, prompt: int, latents: Tensor, timestep: int) -> Any:
        """Refuse: there is no model."""
        raise ValueError("a detector that asks the model declares reads = 'model'")


class _OfModel:
    """What a detector sees that asks the model itself."""

    def __init__(self, parameters: DetectParameters, work: StageAtWork):
        from harness.model.sampling import scheduler_for

        self._model, protection = work.state()
        refuse_sampling_hooks(protection, "a detector that asks the model")
        self._run, self._parameters = work.run, parameters
        self.prompts = parameters.prompts
        self.images_per_prompt = parameters.sampling.images_per_prompt
        scheduler = scheduler_for(self._model, parameters.sampling.scheduler)
        scheduler.set_timesteps(parameters.sampling.steps, device=self._model.device)
        self._model.pipeline.scheduler = scheduler  # `DiffusionModel.restore` puts the model's back
        self.timesteps = [int(timestep) for timestep in scheduler.timesteps]

    def predictions(self, prompt: int) -> Any:
        """Refuse: nothing was kept."""
        raise ValueError("a detector that uses kept predictions declares reads = 'predictions'")

    def ending(self, prompt: int) -> Any:
        """Refuse: nothing was kept."""
        raise ValueError("a detector that uses the attention to the end token declares reads = 'predictions'")

    def images(self, prompt: int) -> Any:
        """Refuse: nothing is drawn."""
        raise ValueError("a detector that uses drawn images declares reads = 'images'")

    def start(self, prompt: int) -> Tensor:
        """Return the starting noise of a prompt, that of its drawing."""
        from harness.model.drawing import starting_latents

        of = 0 if self._parameters.latents == replay.SHARED else prompt
        seeds = [mix(self._run.seed, of, image) for image in range(self.images_per_prompt)]
        return starting_latents(self._model, seeds, self._model.encode_text([""]))[0]

    def predict(self, prompt: int, latents: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Return (for the prompt, for no text), each shaped like latents."""
        import torch

        texts = self._model.encode_text([self.prompts[prompt], ""])
        embeddings = texts.repeat_interleave(len(latents), 0)
        with torch.no_grad(), self._run.autocast():
            twice = torch.cat([latents, latents])
            said = self._model.unet(twice, timestep, encoder_hidden_states=embeddings, return_dict=False)[0]
            self._run.ledger.forward_passes += len(twice)
            if self._parameters.prediction == replay.EPSILON:
                said = replay.as_epsilon(self._model.pipeline.scheduler, said, twice, timestep)
        conditional, unconditional = said.float().chunk(2)
        return conditional, unconditional
