"""Rehearse a stage on the meta device: the method's own code, without values, until its memory was seen.

Nothing is read but configurations, nothing is computed and nothing is kept. The method gets blank images of the model's
size, as many as it will get, and a model whose changed weights are those that the layers under it declare to change.
It is stopped when it has taken a few steps of training (`Method.rehearsed` says how many show all), or has drawn or
measured its first batch.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness.contracts.protection import Protection
from harness.contracts.state import ModelState
from harness.core import regions, registry
from harness.core.errors import one_line
from harness.core.identity import Input, Stage
from harness.core.precision import kind_of
from harness.core.sharding import Sharding
from harness.model import model_files, resolution
from harness.model.run import Run, World
from harness.model.source import ModelSource
from harness.stages.protect import GENERAL
from harness.stages.work import class_of, made

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from harness.model.footprint import Footprint, Peak
    from harness.model.pipeline import DiffusionModel

KINDS = ("images", "prepare", "erase", "immunize", "adapt", "probe", "sample", "memorize", "distill")
"""The kinds of stages that can be rehearsed: they train the diffusion model or draw from it."""


NOT_HERE = "the model is not on this machine yet: fetch it first"


class Unknown(Exception):
    """The memory of a stage is not known, with the reason in a few words."""


class _Seen(BaseException):
    """All was seen: ends the method that is rehearsed. No Exception, so that no method catches it."""


class _OneOf(World):
    """The first of several processes, which meet no others."""

    def __init__(self, size: int):
        self.size = size


@dataclass
class _Run(Run):
    """The environment of a rehearsal: it computes as the meta device can, and saves nothing."""

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model computes."""
        from harness.model.footprint import autocast

        return autocast(kind_of(self.precision))

    def load_state(self) -> None:
        """Return None: there is no saved state."""

    def save_state(self, step, tensors, numbers) -> None:
        """Save nothing."""


def rehearse(
    stage: Stage,
    source: ModelSource,
    sharding: Sharding,
    *,
    on_gpu: bool,
    stages: Mapping[str, Stage] = MappingProxyType({}),
) -> Peak:
    """Return the bytes that a process of a stage needs, by kind.

    `sharding`: its resources; each of its processes gets its share of the batch, but holds all else whole. `on_gpu`:
    main memory does not count; otherwise it does. `stages`: those that it reads, by key.

    Raises Unknown for another kind of stage, a model that is not here, and a method that cannot be rehearsed.
    """
    from harness.model.footprint import Footprint

    footprint = Footprint(kind_of(stage.precision), with_host=not on_gpu)
    _rehearsed(stage, source, sharding, footprint, stages)
    return footprint.peak


def waits(
    stage: Stage,
    source: ModelSource,
    sharding: Sharding = Sharding(),  # noqa: B008  (frozen)
    *,
    stages: Mapping[str, Stage] = MappingProxyType({}),
) -> Counter[str]:
    """Return how often the host waits for the device in the later half of a rehearsal's steps, by operation of torch.

    The earlier half has steps of every kind too, and in it are copied what later ones find on the device. Copies to
    pinned memory count as queued, as they are on a GPU. Raises Unknown as `rehearse` does.
    """
    from harness.model.footprint import Footprint
    from harness.model.waits import Waits

    counted = Waits()

    def stepped(done: int, steps: int) -> None:
        if done == steps // 2:
            counted.counts.clear()

    _rehearsed(stage, source, sharding, Footprint(kind_of(stage.precision)), stages, within=counted, stepped=stepped)
    return counted.counts


def _rehearsed(
    stage: Stage,
    source: ModelSource,
    sharding: Sharding,
    footprint: Footprint,
    stages: Mapping[str, Stage],
    *,
    within: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008  (has no state)
    stepped: Callable[[int, int], None] = lambda done, steps: None,
) -> None:
    """Rehearse a stage under a footprint, and inside it within another context; `stepped` is called after each step."""
    if stage.kind not in KINDS:
        raise Unknown("stages of this kind are not rehearsed")
    try:
        shortened = _shortened(stage)
    except (ValueError, TypeError) as error:
        raise Unknown(one_line(error, 200)) from error
    from harness.model.skeleton import META

    with tempfile.TemporaryDirectory() as folder:
        run = _Run(
            stage.seed, META, stage.precision, Path(folder),
            sharding=replace(sharding, workers=1, offload="none"), world=_OneOf(sharding.workers),
            checkpoint_interval_s=math.inf, notify=lambda text: None,
        )  # fmt: skip
        try:
            with footprint, within:
                _do(stage, shortened, source, run, stages, stepped, footprint=footprint)
        except Unknown:
            raise
        except Exception as error:
            raise Unknown(f"it cannot be rehearsed: {type(error).__name__}: {one_line(error, 200)}") from error


def measurable(
    stage: Stage,
    model: DiffusionModel,
    source: ModelSource,
    run: Run,
    *,
    steps: int | None = None,
    stepped: Callable[[int, int], None] = lambda done, steps: None,
) -> None:
    """Do with a real model and blank images what a rehearsal of the stage does without values, to compare them.

    `steps`: so many, if the stage has them; None: as many as a rehearsal. `stepped(done, steps)` is called after each.
    The stage reads no others. Nothing is kept, and the model is not restored.
    """
    method, parameters, few = _shortened(stage)
    _do(stage, (method, parameters, few if steps is None else steps), source, run, {}, stepped, model=model)


def _do(
    stage: Stage, shortened: tuple[Any, Any, int], source: ModelSource, run: Run, stages, stepped, **how: Any
) -> None:
    """Do a stage until all was seen."""
    method, parameters, steps = shortened

    def seen(done: int, total: int) -> None:
        stepped(done, steps)
        if done >= steps:
            raise _Seen

    run.report = seen
    # what an attack saved is not there; `_Work.state` counts what loading it takes
    inputs = {role: read for role, read in stage.inputs.items() if role.partition(".")[0] not in ("adapt", "probe")}
    alone = replace(stage, parameters=parameters, inputs=inputs)
    work = _Work(alone, source, run, run.folder, method, stages, stage.inputs.get("adapt"), **how)
    with contextlib.suppress(_Seen):
        registry.get("stage", stage.kind)(None).do(parameters, work)


def _shortened(stage: Stage) -> tuple[Any, Any, int]:
    """Return (method or None, parameters of the stage, steps) for a rehearsal that takes few steps."""
    kind = registry.get("stage", stage.kind)
    parameters, method, steps = stage.parameters, None, 1
    if kind.method_kind is not None:
        given = made(kind.method_kind, stage.component, parameters.parameters, stage.local.get("parameters", {}))
        shorter, steps = type(given).rehearsed(given.parameters)
        method = type(given)(shorter)
    elif stage.kind == "memorize":
        steps = 2
    if stage.kind in ("adapt", "probe"):  # a checkpoint would be written to disk
        parameters = replace(parameters, budget=replace(parameters.budget, steps=(1_000_000,)))
    return method, parameters, steps


@dataclass
class _Work:
    """The `StageWork` of a rehearsal."""

    stage: Stage
    source: ModelSource
    run: Run
    folder: Path
    rehearsed: Any  # the stage's method
    stages: Mapping[str, Stage]
    attacked: Input | None  # the adaptation whose checkpoints the stage loads
    footprint: Footprint | None = None
    model: DiffusionModel | None = None  # a real one; None: skeletons

    def method(self) -> Any:
        """Return the stage's method."""
        return self.rehearsed

    def input(self, role: str) -> Path:
        """Raise Unknown: no other stage was done."""
        raise Unknown(f"it reads the stage '{role}'")

    def files(self, role: str, split: str) -> list[Path]:
        """Return blank images, as many as the stage has captions for."""
        parameters, place = self.stage.parameters, role.partition(".")[2]
        if role == GENERAL:
            return [_blank(self.folder, _image_size(self.source))] * len(parameters.general)
        if hasattr(parameters, "concept"):
            known = parameters.concept
        else:
            known = getattr(parameters, "targets" if role.startswith("prior") else role.partition(".")[0])[int(place)]
        captions = known.prior_captions if role.startswith("prior") else known.captions
        return [_blank(self.folder, _image_size(self.source))] * len(captions or ())

    def released(self, role: str) -> Protection:
        """Return what a stage releases: all that its method declares to change, in main memory."""
        from harness.model.pipeline import off_card

        model = self.base()
        known = model.parameters()
        names = _covered(model, self._changes(self.stage.inputs[role]))
        with regions.region(regions.WAITING):
            return Protection(tensors={name: off_card(known[name]) for name in names})

    def base(self) -> DiffusionModel:
        """Return the base model."""
        if self.model is not None:
            return self.model
        from harness.model.skeleton import skeleton

        with self.footprint.weights():
            found = skeleton(self.source)
        if found is None:
            raise Unknown(NOT_HERE)
        found.keeps_originals = self.run.sharding.keep_originals
        return found

    def state(self, name: str = "") -> tuple[DiffusionModel, Protection]:
        """Return the base model with pruned students, and with the originals of what its layers change."""
        from harness.model.pipeline import off_card

        model = self.base()
        for layer in ModelState.read(self.stage.inputs, name).layers:
            if layer.kind == "prune":
                with self.footprint.weights():
                    model.replace("unet", _student(self.stages[layer.key], model))
            else:
                model.change(_covered(model, self._changes(layer)))
        rounded_to = getattr(self.stage.parameters, "rounded_to", None)
        if rounded_to is not None:
            from harness.model import rounding

            model.change(rounding.names(model, rounded_to))
        if self.attacked is not None:
            adapted = self.stages[self.attacked.key]
            attack = made("attack", adapted.component, adapted.parameters.parameters)
            loaded = model.change(_covered(model, attack.overwrites(attack.parameters)))
            with regions.region(regions.ORIGINALS):
                self.before = {each: off_card(parameter) for each, parameter in loaded.items()}
        return model, Protection()

    def _changes(self, read: Input) -> Sequence[str]:
        """Return what a stage declares to change."""
        stage = self.stages[read.key]
        kind = registry.get("stage", stage.kind)
        if kind.method_kind is None:
            return ("unet",)
        return class_of(kind.method_kind, stage.component).threat_model.changes


def _covered(model: DiffusionModel, changes: Sequence[str]) -> list[str]:
    """Return the names of the weights that declared changes cover."""
    from harness.training.declared import covered

    names = model.parameters()
    found = covered(names, changes)
    return [name for name in names if name in found]


def _student(stage: Stage, model: DiffusionModel) -> UNet2DConditionModel:
    """Return the skeleton of a pruned student."""
    from diffusers import UNet2DConditionModel

    from harness.model.skeleton import META
    from harness.model.unet_plan import planned

    parameters, before = stage.parameters, model.unet.config
    if parameters.keep is None:
        config = model_files.read(Path(stage.local["student"]) / "config.json")
    else:
        config = planned(before, parameters.keep, parameters.drop or (), model.tokenizer.model_max_length)
    with META:
        return UNet2DConditionModel.from_config({**config, "sample_size": before.sample_size})


def _image_size(source: ModelSource) -> int:
    """Return the side of the images that a model draws, in pixels."""
    from harness.model.skeleton import configurations

    known = configurations(source)
    if known is None:
        raise Unknown(NOT_HERE)
    return resolution.own(known["unet"], known["vae"])


def _blank(folder: Path, size: int) -> Path:
    """Return an image file of one colour, as large as the model draws."""
    from PIL import Image

    path = folder / "blank.png"
    if not path.exists():
        Image.new("RGB", (size, size), (99, 99, 99)).save(path)
    return path
