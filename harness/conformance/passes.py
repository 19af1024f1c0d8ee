"""Count the samples that really pass through the UNet, forward and backward, by hooks; compare with a ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.conformance.verdict import NotApplicable, fail

if TYPE_CHECKING:
    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Ledger

FACTOR = 2.0
"""Allowed factor between an estimate and the counted passes, in both directions."""
DOUBLE_BACKWARD = 4.0
"""Maximum that a ledger may count for one backward pass: a double backward goes through the graph several times."""


@dataclass
class Passes:
    """UNet passes over one sample."""

    forward: int = 0
    backward: int = 0


@contextlib.contextmanager
def counted(*models: DiffusionModel | None) -> Iterator[Passes]:
    """Yield the count of passes in the block through the UNets of these models; None is no model."""
    seen = Passes()

    def note(module: Any, given: Any, made: Any) -> None:
        output = made[0] if isinstance(made, tuple) else made.sample
        seen.forward += len(output)
        if output.requires_grad:
            output.register_hook(back)

    def back(gradient: Any) -> None:
        seen.backward += len(gradient)

    hooks = [model.unet.register_forward_hook(note) for model in models if model is not None]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def require_counted(method: Any, ledger: Ledger, seen: Passes) -> None:
    """Raise Nonconforming if a ledger differs from the counted passes; NotApplicable if there were none."""
    if ledger.forward_passes != seen.forward:
        fail(method, f"counts {ledger.forward_passes:g} forward passes in the ledger where {seen.forward} were made")
    if not seen.backward <= ledger.backward_passes <= DOUBLE_BACKWARD * seen.backward:
        fail(method, f"counts {ledger.backward_passes:g} backward passes in the ledger where {seen.backward} were made")
    if not seen.forward:
        raise NotApplicable("it makes no pass through the UNet")


def require_estimated(method: Any, ledger: Ledger, estimate: float, estimator: str) -> None:
    """Raise Nonconforming if an estimate (a backward pass counts two) is far from the ledger's passes."""
    cost = ledger.forward_passes + 2 * ledger.backward_passes
    if not cost / FACTOR <= estimate <= cost * FACTOR:
        fail(method, f"estimates {estimate:g} passes by `{estimator}`, but made {cost:g} (a backward counts two)")
