"""The names of the tensors that an entry of `ThreatModel.changes` covers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import get_args

COMPONENTS = ("unet", "text_encoder", "vae")


def covered(names: Collection[str], changes: Iterable[str]) -> set[str]:
    """Return the names from `names` that the entries cover.

    "unet", "text_encoder" and "vae" cover a component; "unet.<set>" covers a set of `harness.training.selection`, such
    as "unet.attention". Raises ValueError for any other entry.
    """
    from harness.training.selection import ParameterSet, select

    found: set[str] = set()
    for entry in changes:
        component, _, parameter_set = entry.partition(".")
        if entry in COMPONENTS:
            found |= {name for name in names if name.startswith(f"{component}.")}
        elif component == "unet" and parameter_set in get_args(ParameterSet):
            found |= set(select(names, parameter_set))
        else:
            known = [*COMPONENTS, *(f"unet.{s}" for s in get_args(ParameterSet) if s != "unet")]
            raise ValueError(f"'{entry}' under `changes` names nothing; known: {', '.join(known)}")
    return found
