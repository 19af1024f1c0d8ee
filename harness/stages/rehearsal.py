"""Rehearse a stage on the meta device: the method's own code, without values, until its memory was seen.

Nothing is read but configurations, nothing is computed and nothing is kept. The method gets blank images of the model's
size, as many as it will get, and a model whose changed weights are those that the layers under it declare to change.
It is stopped when it has taken a few steps of training (`Method.rehearsed` says how many show all), or has drawn or
measured its first batch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.protection import Protection
from harness.core import regions, registry
from harness.core.errors import one_line
from harness.core.identity import Stage
from harness.core.sharding import Sharding
from harness.model.footprint import Footprint, Peak, autocast
from harness.model.run import Run, World
from harness.model.skeleton import META, configurations, skeleton
from harness.model.source import ModelSource
from harness.stages.work import made

if TYPE_CHECKING:
    from harness.model.pipeline import DiffusionModel

KINDS = ("images", "prepare", "erase", "immunize", "adapt", "probe", "sample", "memorize", "distill")
"""The kinds of stages that can be rehearsed: they work with the diffusion model."""


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

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the model computes."""
        return autocast(self.precision)

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
    layers: Callable[[Stage, str], Sequence[type]] = lambda stage, name: (),
) -> Peak:
    """Return the bytes that a process of a stage needs, by kind.

    `sharding`: its resources; each of its processes gets its share of the batch, but holds all else whole. `on_gpu`:
    main memory does not count; otherwise it does. `layers`: of a stage and the name of one of its states, the methods
    of the layers that are over the base model.

    Raises Unknown for a kind of stage that works without the diffusion model, a model that is not here, and a method
    that cannot be rehearsed.
    """
    if stage.kind not in KINDS:
        raise Unknown("not rehearsed: it works with models of its own")
    method, parameters, steps = _shortened(stage)
    footprint = Footprint(stage.precision, with_host=not on_gpu)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as whole:

        def seen(done: int, total: int) -> None:
            if done >= steps:
                raise _Seen

        run = _Run(
            stage.seed, META, stage.precision, Path(folder), report=seen,
            sharding=replace(sharding, workers=1, offload="none"), world=_OneOf(sharding.workers),
            checkpoint_interval_s=math.inf, notify=lambda text: None,
        )  # fmt: skip
        whole.enter_context(footprint)
        work = _Work(replace(stage, parameters=parameters), source, run, Path(folder), footprint, method, layers)
        try:
            registry.get("stage", stage.kind)(None).do(parameters, work)
        except _Seen:
            pass
        except Exception as error:
            raise Unknown(f"cannot be rehearsed: {type(error).__name__}: {one_line(error, 200)}") from error
    return footprint.peak


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
    footprint: Footprint
    rehearsed: Any  # the stage's method
    layers: Callable[[Stage, str], Sequence[type]]

    def method(self) -> Any:
        """Return the stage's method."""
        return self.rehearsed

    def input(self, role: str) -> Path:
        """Raise Unknown: no other stage was done."""
        raise Unknown(f"it reads the stage '{role}'")

    def files(self, role: str, split: str) -> list[Path]:
        """Return blank images, as many as the stage has captions for."""
        parameters, place = self.stage.parameters, role.partition(".")[2]
        if hasattr(parameters, "concept"):
            known = parameters.concept
        else:
            known = getattr(parameters, "targets" if role.startswith("prior") else role.partition(".")[0])[int(place)]
        captions = known.prior_captions if role.startswith("prior") else known.captions
        return [_blank(self.folder, _image_size(self.source))] * len(captions or ())

    def released(self, role: str) -> Protection:
        """Return what a stage releases: all that its method declares to change, in main memory."""
        model = self.base()
        names = _changed(model, self.layers(self.stage, role))
        known = model.parameters()
        with regions.region(regions.WAITING):
            return Protection(tensors={name: known[name].detach().to("cpu", copy=True) for name in names})

    def base(self) -> DiffusionModel:
        """Return the base model."""
        with self.footprint.weights():
            found = skeleton(self.source)
        if found is None:
            raise Unknown("the model is not here yet: fetch it first")
        return found

    def state(self, name: str = "") -> tuple[DiffusionModel, Protection]:
        """Return the base model, with the originals of what its layers change."""
        model = self.base()
        model.change(_changed(model, self.layers(self.stage, name)))
        return model, Protection()


def _changed(model: DiffusionModel, methods: Sequence[type]) -> list[str]:
    """Return the names of the weights that methods declare to change."""
    from harness.training.declared import covered

    names = model.parameters()
    changed = set()
    for method in methods:
        changed |= covered(names, method.threat_model.changes)
    return [name for name in names if name in changed]


def _image_size(source: ModelSource) -> int:
    """Return the side of the images that a model draws, in pixels."""
    known = configurations(source)
    if known is None:
        raise Unknown("the model is not here yet: fetch it first")
    return known["unet"]["sample_size"] * 2 ** (len(known["vae"]["block_out_channels"]) - 1)


def _blank(folder: Path, size: int) -> Path:
    """Return an image file of one colour, as large as the model draws."""
    from PIL import Image

    path = folder / "blank.png"
    if not path.exists():
        Image.new("RGB", (size, size), (99, 99, 99)).save(path)
    return path
