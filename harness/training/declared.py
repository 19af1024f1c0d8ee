"""What a defense declares in its `ThreatModel`, against what it releases: by the names of tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import get_args

from harness.contracts.protection import Protection, ThreatModel
from harness.training.selection import ParameterSet, select

COMPONENTS = ("unet", "text_encoder", "vae")
HONOURED = {"frozen": "frozen", "adaptation": "adaptation_hooks", "sampling": "sampling_hooks"}
"""Attribute of a `Protection` -> entry that `ThreatModel.must_honour` must have if the attribute is not empty."""


def covered(names: Collection[str], changes: Iterable[str]) -> set[str]:
    """Return the names from `names`, the model's parameters, that the entries cover.

    "unet", "text_encoder" and "vae" cover a component; "unet.<set>" covers a set of `harness.training.selection`, such
    as "unet.attention"; any other dotted path covers that module or parameter, such as "unet.conv_out". Raises
    ValueError for an entry that covers nothing.
    """
    found: set[str] = set()
    for entry in changes:
        component, _, rest = entry.partition(".")
        if component == "unet" and rest in get_args(ParameterSet):
            own = select(names, rest)
        else:
            own = [name for name in names if name == entry or name.startswith(f"{entry}.")]
        if not own:
            known = [*COMPONENTS, *(f"unet.{s}" for s in get_args(ParameterSet) if s != "unet")]
            raise ValueError(
                f"'{entry}' under `changes` of the threat model names nothing in this model; known: "
                f"{', '.join(known)}, and dotted paths of modules"
            )
        found |= set(own)
    return found


def undeclared(released: Protection, model: ThreatModel, names: Collection[str]) -> str | None:
    """Return what a defense releases and its threat model does not declare, in words that follow "it"; None: nothing.

    `names`: the model's parameters. Raises ValueError for an entry under `changes` that covers nothing.
    """
    declared = covered(names, model.changes)
    changes = ", ".join(model.changes) or "nothing"
    for component in released.components:
        if component not in model.changes:
            return f"releases another {component}, but its threat model declares to change {changes}"
    for name in released.tensors:
        if name.partition(".")[0] not in released.components and name in names and name not in declared:
            return f"changes '{name}', but its threat model declares to change {changes}"
    for attribute, word in HONOURED.items():
        if getattr(released, attribute) and word not in model.must_honour:
            return f"releases '{attribute}', but `must_honour` of its threat model lacks '{word}'"
    return None
