"""The contract of a kind of stage: its typed parameters, and how one such stage is run.

A kind is one class, registered by a decorator::

    @register("stage")
    class Trajectory(StageKind):
        name = "trajectory"
        version = 1
        after = ("immunize",)

        @dataclass(frozen=True)
        class Parameters:
            prompts: tuple[str, ...]
            steps: int

        def do(self, parameters, work):
            model, _ = work.state()
            ...

A task builds the parameters, and the stage gets equal ones, also in another process. Their JSON is part of the stage's
key. `do` fills `work.folder`, which is committed when it returns. An exception is recorded and stops no other stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from harness.contracts.method import Method
from harness.core import registry
from harness.core.described import as_json, typed
from harness.core.identity import Input, Stage

if TYPE_CHECKING:
    from harness.contracts.protection import Protection
    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run


class StageWork(Protocol):
    """What a stage works with: its environment, its folder, and its inputs."""

    stage: Stage
    run: Run
    """Seeds by purpose, device, precision, a folder to resume from, progress, the ledger."""
    folder: Path
    """Becomes the committed folder of the stage."""

    def input(self, role: str) -> Path:
        """Return the folder of the committed stage that has this role among the inputs."""

    def files(self, role: str, split: str) -> list[Path]:
        """Return the images of a split of an `images` input, in order."""

    def released(self, role: str) -> Protection:
        """Return what the committed input stage with this role released, in main memory."""

    def base(self) -> DiffusionModel:
        """Return the base model in its released state."""

    def state(self, name: str = "") -> tuple[DiffusionModel, Protection]:
        """Return (model, protection) of the state that the stage's inputs name: all layers over the base model.

        States of different names are different models in memory.
        """


class StageKind(Method):
    """Base class of the kinds of stages. Subclasses set the class attributes and write `do`."""

    after: ClassVar[tuple[str, ...]] = ()
    """The kinds that such a stage may read; every list puts them before it."""
    method_kind: ClassVar[str | None] = None
    """The kind of the method that does such a stage and that its component names; None: the stage kind itself."""
    per_trial: ClassVar[bool] = False
    """Whether a script for a single trial would do it itself; `plan` uses this to count what sharing saves."""
    compiles: ClassVar[bool] = False
    """Whether `resources.compile` applies to it: it calls the UNet by `DiffusionModel.denoise` alone, without hooks on
    modules and without attention of its own. Others compute without compiling."""
    is_layer: ClassVar[bool] = False
    """Whether its folder holds a `Protection`, so that it can be a layer of a model state."""
    restorable: ClassVar[bool] = False
    """For a layer: whether an adaptive attacker who restores components puts back the weights from before it."""
    reads_void: ClassVar[bool] = False
    """Whether it takes stages without a result (`harness.stages.void`) as they are; others are void if one that they
    read is."""
    spare: ClassVar[str | None] = None
    """A folder of the committed stage that may be deleted if it is large, once all stages of its unit have read it."""

    @classmethod
    def can_spread(cls, stage: Stage) -> bool:
        """Return whether several processes can share a stage, because its method can be spread."""
        return False

    @classmethod
    def prompts(cls, parameters: Any) -> Sequence[str]:
        """Return the prompts, by prompt index, for the rows of its scores; () without prompts."""
        return ()

    def do(self, parameters: Any, work: StageWork) -> None:
        """Fill `work.folder`."""
        raise NotImplementedError


def to_json(stage: Stage) -> dict[str, Any]:
    """Return a stage as JSON values, for another process; `from_json` gives it back."""
    plain = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    inputs = {role: [read.kind, read.key] for role, read in stage.inputs.items()}
    return as_json({**plain, "parameters": stage.parameters, "inputs": inputs})


def title(plain: Mapping[str, Any]) -> str:
    """Return the title of a stage that `to_json` described."""
    return f"{plain['what']} {plain['label']}" if plain["what"] else plain["label"]


def from_json(plain: Mapping[str, Any]) -> Stage:
    """Return the stage that `to_json` described, with the typed parameters of its kind."""
    kind = registry.get("stage", plain["kind"])
    inputs = {role: Input(*read) for role, read in plain["inputs"].items()}
    return Stage(**{**plain, "parameters": typed(kind.Parameters, plain["parameters"]), "inputs": inputs})


def kinds_in_order() -> list[str]:
    """Return the names of the registered kinds, each after the kinds that it may read, otherwise sorted by name."""
    order: dict[str, None] = {}

    def visit(name: str, above: Mapping[str, None]) -> None:
        if name in order or name in above:
            return
        for other in registry.get("stage", name).after:
            visit(other, {**above, name: None})
        order[name] = None

    for name in registry.names("stage"):
        visit(name, {})
    return list(order)
