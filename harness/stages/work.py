"""A stage in progress: its description and environment, with methods that several kinds share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness.contracts.layers import apply
from harness.contracts.state import ModelState
from harness.core import parameters, registry
from harness.core.identity import Stage
from harness.core.tuning import CHOSEN, PROPOSAL
from harness.model.run import Run
from harness.stages.workplace import Workplace
from harness.store.store import Store

if TYPE_CHECKING:
    from harness.contracts.protection import Protection

SETTINGS = "settings.json"
"""In the folder of a proposal or a choice: the changed parameters. In that of a release made with either: all."""


@dataclass
class StageAtWork:
    """The tools for doing a stage: the `StageWork` of `harness.contracts.stage`."""

    stage: Stage
    workplace: Workplace
    store: Store
    run: Run
    folder: Path  # becomes the committed folder

    def input(self, role: str) -> Path:
        """Return the folder of the committed input stage with a role."""
        read = self.stage.inputs[role]
        return self.store.path(read.kind, read.key)

    def files(self, role: str, split: str) -> list[Path]:
        """Return the images of a split of an `images` input, in order."""
        return sorted((self.input(role) / split).glob("*.png"))

    def method(self) -> Any:
        """Return the method that the stage's component names, with its parameters."""
        kind = registry.get("stage", self.stage.kind).method_kind
        given = {**self.stage.parameters.parameters, **self._setting(kind)}
        return made(kind, self.stage.component, given, self.stage.local.get("parameters", {}))

    def _setting(self, kind: str | None) -> Mapping[str, Any]:
        """Return the parameters of a defense that a search proposed or chose; {} if none did."""
        role = next((role for role in (CHOSEN, PROPOSAL) if role in self.stage.inputs), None)
        if role is None or kind != "defense":
            return {}
        return json.loads((self.input(role) / SETTINGS).read_text(encoding="utf-8"))["values"]

    def released(self, role: str) -> Protection:
        """Return what the committed input stage with a role released, in main memory."""
        from harness.contracts.protection import Protection

        with self.run.ledger.phase("load"):
            return Protection.load(self.input(role))

    def base(self):
        """Return the base model in its released state."""
        return self._model("")

    def state(self, name: str = ""):
        """Return (model, protection): the base model with all layers that the stage's inputs name.

        If an attacker restores components, their tensors are those from before the defense: from the base model, or
        from the layers below the defense. An attacker who rounds weights does so after that. States with different
        names are separate models in memory.
        """
        restored = frozenset(getattr(self.stage.parameters, "restore", None) or ())
        model = self._model(name)
        layers = [
            (self.store.path(layer.kind, layer.key), restored if registry.get("stage", layer.kind).restorable else ())
            for layer in ModelState.read(self.stage.inputs, name).layers
        ]
        released = apply(model, layers)
        rounded_to = getattr(self.stage.parameters, "rounded_to", None)
        if rounded_to is not None:
            from harness.model.rounding import round_weights

            round_weights(model, rounded_to)
        return model, released

    def _model(self, name: str):
        from harness.model.pipeline import warm

        with self.run.ledger.phase("load"):
            model = warm(self.workplace.source, self.run.device, name)
        chosen = self.run.sharding
        model.keeps_originals = chosen.keep_originals
        model.lay_out(channels_last=chosen.channels_last)
        model.compile_passes(chosen.compile and registry.get("stage", self.stage.kind).compiles)
        return model


def made(
    kind: str, component: str, described: Mapping[str, Any], local: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """Return the method of a component with these parameters; `local`: their values on this machine, such as paths.

    Raises ValueError if this process has other code for it.
    """
    cls = class_of(kind, component)
    values, mistakes = parameters.resolve(cls, {**described, **local})
    if mistakes:
        raise ValueError("; ".join(message for _, message in mistakes))
    return cls(values)


def class_of(kind: str, component: str) -> type:
    """Return the class of a component. Raises ValueError if its code in this process is not what the plan digested."""
    cls = registry.get(kind, component.partition("@")[0])
    here = registry.component(cls)
    if here != component.partition("/")[0]:
        raise ValueError(
            f"{kind} '{cls.name}' was edited after the run was planned; run the same command again "
            f"({component.rpartition('+')[2]} was planned, {here.rpartition('+')[2]} is here)"
        )
    return cls
