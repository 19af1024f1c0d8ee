"""How the layers of a model state are written over a model: whole components, then changed tensors, in order."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from harness.contracts.protection import Protection

if TYPE_CHECKING:
    from harness.model.pipeline import DiffusionModel


def apply(model: DiffusionModel, layers: Iterable[tuple[Path, Collection[str]]]) -> Protection:
    """Write layers over a model; return the publisher's requirements (frozen names, hooks) of all layers together.

    A layer is (folder of its stage, components that are left as they are below it). Raises KeyError or ValueError where
    a layer does not fit the model below it.
    """
    released = Protection()
    for folder, left in layers:
        layer = Protection.load(folder)
        for component, own in layer.components.items():
            if component not in left:
                model.replace(component, own)
        prefixes = tuple(f"{component}." for component in left)
        model.overlay({name: t for name, t in layer.tensors.items() if not (prefixes and name.startswith(prefixes))})
        released = released.with_asked(layer)
    return released
