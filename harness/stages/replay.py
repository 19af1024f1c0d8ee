"""Images that a model draws for given prompts, and the noise predictions along their sampling.

Folder: images/step_0000000/PPP_III.png (the layout of `sample`, so that metrics score it alike); replay.json; if
predictions are kept, predictions/all/PPP.safetensors with `conditional` and `unconditional`, each [images, steps,
channels, height, width] in fp32, and `ending` [images, height, width] if that is kept: the attention to the prompt's
end token at the last step. Predictions are large: they may be deleted once every detector of the unit has read them.

The starting noise of image i of prompt p is that of `sample` under the same seed; with shared latents that of prompt 0.
Only whole prompts are drawn together, one with shared latents. So images are those of `sample` bit for bit where
`batch_size` is a multiple of the images a prompt; else its batches are others, which may change rounding.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from harness.contracts.stage import StageKind
from harness.core.described import optional
from harness.core.files import sync_files, write_json
from harness.core.finite import NothingDrawn, described, flat_among
from harness.core.registry import register
from harness.core.sampling import Sampling
from harness.stages.sample import sampling_hooks
from harness.stages.work import StageAtWork
from harness.store.layout import step_folder

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.drawing import Drawing
    from harness.model.pipeline import DiffusionModel

PREDICTIONS, WHOLE = "predictions", "all"
"""The folder of predictions, and its one subfolder: what may be deleted is measured by subfolders."""
FILE = "replay.json"
"""{"timesteps": from noise to image, "images": of a prompt}."""
COST = "cost.json"
"""What the prompts that were drawn together cost, in the folder of the first one, until the stage is committed."""
SHARED = "shared"
PER_PROMPT = "per_prompt"
EPSILON = "epsilon"


@dataclass(frozen=True)
class ReplayParameters:
    """Prompts and sampling, and whether predictions are kept."""

    prompts: tuple[str, ...]
    sampling: Sampling  # with its number of images per prompt
    latents: Literal["per_prompt", "shared"]
    prediction: Literal["epsilon", "model"]  # epsilon: of the noise, also of a model of velocities; model: its own
    keeps_predictions: bool | None = optional()
    keeps_ending: bool | None = optional()  # with predictions, and without sampling hooks


@register("stage")
class Replay(StageKind):
    """Draw images for prompts from a state, under its sampling hooks."""

    name = "replay"
    version = 1
    after = ("erase", "immunize", "memorize", "mitigate")
    spare = PREDICTIONS
    Parameters = ReplayParameters

    @classmethod
    def prompts(cls, parameters: ReplayParameters) -> Sequence[str]:
        """Return the prompts as they are asked for, before a mitigation changes them."""
        return parameters.prompts

    def do(self, parameters: ReplayParameters, work: StageAtWork) -> None:
        """Draw; after a kill, continue with the prompts that are missing."""
        settings = parameters.sampling
        if parameters.keeps_predictions and settings.guidance <= 1:
            raise ValueError("predictions are kept under guidance only: without it there is none for no text")
        if parameters.keeps_ending and not parameters.keeps_predictions:
            raise ValueError("keeps_ending needs keeps_predictions: they are kept in one file")
        model, protection = work.state()
        hooks = sampling_hooks(protection, "honest")
        if parameters.keeps_ending and hooks:
            raise ValueError("the end token is that of the prompt, which sampling hooks may change; keep no ending")
        saved = work.run.folder / "replay"
        saved.mkdir(exist_ok=True)
        count = len(parameters.prompts)
        each = settings.images_per_prompt
        for first, stop in _blocks(count, each, settings.batch_size, parameters.latents):
            work.run.report(first * each, count * each)
            if all((saved / f"{prompt:03d}").is_dir() for prompt in range(first, stop)):  # drawn before a kill
                _count(work, saved / f"{first:03d}" / COST)
            else:
                _draw(model, work, parameters, hooks, first, stop, saved)
        work.run.report(count * each, count * each)
        _lay_out(parameters, work, saved)
        _note_flat(work, bool(hooks))


def _blocks(count: int, each: int, batch_size: int, latents: str) -> Iterator[tuple[int, int]]:
    """Yield ranges of prompts that are drawn together: whole batches of images, so that a resumed run has the same."""
    size = 1 if latents == SHARED else max(1, batch_size // each)
    for first in range(0, count, size):
        yield first, min(first + size, count)


def _count(work: StageAtWork, file: Path) -> None:
    """Add what the drawing of a block cost before a kill to the ledger, so that costs do not depend on kills."""
    ledger, cost = work.run.ledger, json.loads(file.read_text(encoding="utf-8"))
    ledger.forward_passes += cost["forward_passes"]
    ledger.backward_passes += cost["backward_passes"]
    for name, value in cost["numbers"].items():
        ledger.numbers[name] = ledger.numbers.get(name, 0) + value


def _draw(
    model: DiffusionModel, work: StageAtWork, parameters: ReplayParameters, hooks: Sequence[Any], first: int, stop: int,
    saved: Path,
) -> None:
    """Draw the images of some prompts, each into a folder that is renamed last."""
    import torch

    from harness.model.sampling import sample

    each = parameters.sampling.images_per_prompt
    prediction = parameters.prediction if parameters.keeps_predictions else None
    recorder = Recorder(prediction, keeps_ending=bool(parameters.keeps_ending))
    images: list[list[Any]] = [[] for _ in range(first, stop)]
    ledger = work.run.ledger
    before = ledger.forward_passes, ledger.backward_passes, dict(ledger.numbers)
    with ledger.phase("sample"):
        drawn = sample(
            model, work.run, parameters.prompts[first:stop], parameters.sampling, images_per_prompt=each,
            seed=work.run.seed, hooks=[*hooks, recorder],
            first_prompt=0 if parameters.latents == SHARED else first,
        )  # fmt: skip
        for prompt, _, image in drawn:
            images[prompt].append(image)
    cost = {
        "forward_passes": ledger.forward_passes - before[0],
        "backward_passes": ledger.backward_passes - before[1],
        "numbers": {name: value - before[2].get(name, 0) for name, value in ledger.numbers.items()},
    }
    predictions = recorder.by_prompt(each) if parameters.keeps_predictions else []
    for place, own in enumerate(images):
        final = saved / f"{first + place:03d}"
        temporary = saved / f".{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        temporary.mkdir()
        for index, image in enumerate(own):
            image.save(temporary / f"{index:03d}.png")
        write_json(temporary / FILE, {"timesteps": recorder.timesteps, "images": each})
        if place == 0:
            write_json(temporary / COST, cost)
        if predictions:
            from safetensors.torch import save_file

            tensors = dict(zip(("conditional", "unconditional"), predictions[place], strict=True))
            if recorder.endings:
                tensors["ending"] = torch.cat(recorder.endings)[place * each : (place + 1) * each].clone()
            save_file(tensors, temporary / "predictions.safetensors")
        sync_files(temporary)
        temporary.rename(final)


def _lay_out(parameters: ReplayParameters, work: StageAtWork, saved: Path) -> None:
    """Link what was drawn into the folder of the stage."""
    pictures = work.folder / "images" / step_folder(0)
    pictures.mkdir(parents=True)
    kept = work.folder / PREDICTIONS / WHOLE
    if parameters.keeps_predictions:
        kept.mkdir(parents=True)
    for prompt in range(len(parameters.prompts)):
        own = saved / f"{prompt:03d}"
        for file in sorted(own.glob("*.png")):
            os.link(file, pictures / f"{prompt:03d}_{file.name}")
        if parameters.keeps_predictions:
            os.link(own / "predictions.safetensors", kept / f"{prompt:03d}.safetensors")
    shutil.copyfile(saved / f"{0:03d}" / FILE, work.folder / FILE)


def _note_flat(work: StageAtWork, is_hooked: bool) -> None:
    """Say how many images are one flat colour; raise NothingDrawn if all are and no hook drew them so."""
    files = sorted((work.folder / "images" / step_folder(0)).iterdir())
    colours = flat_among(files)
    if colours and len(colours) == len(files) and not is_hooked:
        what = f"all {len(files)} images are one flat colour, {described(colours)}"
        raise NothingDrawn(f"{what}: the model draws nothing; check its training, its VAE and 'sampling'")
    if colours:
        work.run.notify(f"{len(colours)} of {len(files)} images are one flat colour")
        work.run.ledger.numbers["flat_images"] = len(colours)


class Recorder:
    """Keeps the timesteps and the predictions of each step, as a watcher of `harness.model.drawing`.

    `prediction`: as of `ReplayParameters`; None keeps no predictions. `keeps_ending`: also the attention to the end
    token at the last step, in `endings`, one [images, height, width] a batch.
    """

    needs_gradient: ClassVar[bool] = False

    def __init__(self, prediction: str | None, *, keeps_ending: bool = False):
        self._prediction, self._keeps_ending = prediction, keeps_ending
        self._keeping = contextlib.ExitStack()
        self._maps: list[Tensor] = []
        self.endings: list[Tensor] = []
        self._batches: list[list[tuple[Tensor, Tensor]]] = []
        self.timesteps: list[int] = []

    def begin(self, drawing: Drawing) -> None:
        """Begin a batch."""
        self._batches.append([])
        self.timesteps = list(drawing.timesteps)

    def at_step(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Let the last step keep its attention; predictions come later in the step."""
        from harness.model import attention

        if self._keeps_ending and index == len(drawing.timesteps) - 1:
            unet = drawing.model.unet
            self._maps = self._keeping.enter_context(attention.kept(unet, attention.first_layers(unet, 2)))

    def at_prediction(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Keep the predictions of a step. Raises ValueError if a hook ended guidance."""
        if self._maps:
            self._keeping.close()
            self.endings.append(_ending(drawing, self._maps))
            self._maps = []
        if self._prediction is None:
            return
        both = [drawing.conditional, drawing.unconditional]
        if both[1] is None:
            raise ValueError("a hook ended guidance: there is no prediction for no text to keep")
        if self._prediction == EPSILON:
            scheduler = drawing.model.pipeline.scheduler
            both = [as_epsilon(scheduler, said, drawing.latents, timestep) for said in both]
        self._batches[-1].append(tuple(said.float().cpu() for said in both))

    def end(self, drawing: Drawing) -> None:
        """Give the layers back their processors, also after a failure."""
        self._keeping.close()

    def by_prompt(self, each: int) -> list[tuple[Tensor, Tensor]]:
        """Return (conditional, unconditional) of every prompt, each [images, steps, channels, height, width]."""
        import torch

        conditional, unconditional = (
            torch.cat([torch.stack([step[side] for step in batch], 1) for batch in self._batches]) for side in (0, 1)
        )
        return [
            (own.contiguous(), other.contiguous())
            for own, other in zip(conditional.split(each), unconditional.split(each), strict=True)
        ]


def _ending(drawing: Drawing, maps: Sequence[Tensor]) -> Tensor:
    """Return the mean attention of each place to the end token, [images, height, width] of the latents, on the CPU.

    `maps`: of each layer, [both halves, places, tokens], the prompts' half last. Layers of fewer places are repeated.
    """
    import torch

    ids = drawing.model.tokenize(drawing.prompts)
    # padding may have the same id: the first one ends the prompt
    ends = (ids == drawing.model.tokenizer.eos_token_id).int().argmax(dim=1)
    size = drawing.latents.shape[-2:]
    found = torch.zeros(len(ids), *size)
    for each in maps:
        own = each[-len(ids) :].cpu()[torch.arange(len(ids)), :, ends]  # [images, places]
        side = round(own.shape[1] ** 0.5)
        found += torch.nn.functional.interpolate(own.view(-1, 1, side, side), size)[:, 0] / len(maps)
    return found


def as_epsilon(scheduler: Any, said: Tensor, latents: Tensor, timestep: int) -> Tensor:
    """Return a prediction as one of the noise: of a velocity v, sqrt(abar) v + sqrt(1 - abar) x_t.

    `scheduler`: that of the drawing. Where abar is 0 (the first step of a model with zero terminal SNR) all texts have
    the same one, x_t. Raises ValueError for a prediction type that is neither epsilon nor v_prediction.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return said
    if kind != "v_prediction":
        raise ValueError(f"predictions of type '{kind}' cannot be converted to epsilon; set prediction: model")
    share = scheduler.alphas_cumprod[timestep].to(said)
    return share.sqrt() * said + (1 - share).sqrt() * latents.to(said)


def read(folder: Path, prompt: int) -> tuple[Tensor, Tensor]:
    """Return (conditional, unconditional) of a prompt from the folder of a committed stage."""
    from safetensors.torch import load_file

    kept = load_file(folder / PREDICTIONS / WHOLE / f"{prompt:03d}.safetensors")
    return kept["conditional"], kept["unconditional"]


def ending(folder: Path, prompt: int) -> Tensor:
    """Return the attention to a prompt's end token, [images, height, width]."""
    from safetensors import safe_open

    with safe_open(folder / PREDICTIONS / WHOLE / f"{prompt:03d}.safetensors", "pt") as file:
        return file.get_tensor("ending")


def timesteps(folder: Path) -> list[int]:
    """Return the timesteps of a committed stage."""
    return json.loads((folder / FILE).read_text(encoding="utf-8"))["timesteps"]
