"""A state of the model: the base, and layers over it in the order in which they were made.

A layer is a committed stage whose folder holds a `Protection`: changed tensors, whole components with their
configuration (a pruned UNet), frozen names, hooks. Later layers are written over earlier ones. A stage names the state
that it works on by its inputs, one role a layer; a second state (a teacher beside a student) has a name, which
prefixes its roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.contracts.stage import kinds_in_order
from harness.core import registry
from harness.core.identity import Input


@dataclass(frozen=True)
class ModelState:
    """Layers over the base model; without any it is the base model itself."""

    layers: tuple[Input, ...] = ()

    def over(self, kind: str, key: str) -> ModelState:
        """Return this state with one more layer on top."""
        return ModelState((*self.layers, Input(kind, key)))

    def inputs(self, name: str = "") -> dict[str, Input]:
        """Return role -> layer for a stage that works on this state; `name`: of a further state of the same stage.

        A role is the layer's kind, numbered from the second of a kind on: keys hold roles without their order, so the
        order must follow from them. Raises ValueError where it does not: layers go in the order of their kinds.
        """
        order = [kind for kind in kinds_in_order() if registry.get("stage", kind).is_layer]
        unfit = next((layer.kind for layer in self.layers if layer.kind not in order), None)
        if unfit:
            raise ValueError(f"a stage of kind {unfit} is no layer; layers are {', '.join(order)}")
        places = [order.index(layer.kind) for layer in self.layers]
        if places != sorted(places):
            kinds = ", ".join(layer.kind for layer in self.layers)
            raise ValueError(f"layers must follow the order of their kinds, {', '.join(order)} (got {kinds})")
        roles: dict[str, Input] = {}
        for layer in self.layers:
            count = sum(role.partition("#")[0] == _role(name, layer.kind) for role in roles)
            roles[_role(name, layer.kind) + (f"#{count + 1}" if count else "")] = layer
        return roles

    @classmethod
    def read(cls, inputs: Mapping[str, Input], name: str = "") -> ModelState:
        """Return the state that `inputs` names, as `inputs(name)` returned it."""
        order = [kind for kind in kinds_in_order() if registry.get("stage", kind).is_layer]
        found = [
            (order.index(read.kind), int(role.partition("#")[2] or 1), read)
            for role, read in inputs.items()
            if read.kind in order and role.partition("#")[0] == _role(name, read.kind)
        ]
        return cls(tuple(read for _, _, read in sorted(found, key=lambda each: each[:2])))


def _role(name: str, kind: str) -> str:
    return f"{name}.{kind}" if name else kind
