"""How many samples really passed the UNet, forward and backward: counted by hooks, to check the ledger."""

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
"""The factor by which an estimate may differ from the count, either way."""
DOUBLE_BACKWARD = 4.0
"""The most that a ledger may count for one backward pass: a double backward traverses the graph several times."""


@dataclass
class Passes:
    """UNet passes over one sample."""

    forward: int = 0
    backward: int = 0


@contextlib.contextmanager
def counted(model: DiffusionModel) -> Iterator[Passes]:
    """Yield a count of the UNet's passes in the block."""
    seen = Passes()

    def note(module: Any, given: Any, made: Any) -> None:
        output = made[0] if isinstance(made, tuple) else made.sample
        seen.forward += len(output)
        if output.requires_grad:
            output.register_hook(back)

    def back(gradient: Any) -> None:
        seen.backward += len(gradient)

    hook = model.unet.register_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def require_counted(method: Any, ledger: Ledger, seen: Passes) -> None:
    """Raise Nonconforming when a ledger differs from what was seen; NotApplicable when there was nothing."""
    if ledger.forward_passes != seen.forward:
        fail(method, f"counts {ledger.forward_passes:g} forward passes in the ledger where {seen.forward} were made")
    if not seen.backward <= ledger.backward_passes <= DOUBLE_BACKWARD * seen.backward:
        fail(method, f"counts {ledger.backward_passes:g} backward passes in the ledger where {seen.backward} were made")
    if not seen.forward:
        raise NotApplicable("it makes no pass through the UNet")


def require_estimated(method: Any, ledger: Ledger, estimate: float, estimator: str) -> None:
    """Raise Nonconforming when an estimate (a backward pass counts two) is far from the ledger's count."""
    cost = ledger.forward_passes + 2 * ledger.backward_passes
    if not cost / FACTOR <= estimate <= cost * FACTOR:
        fail(method, f"estimates {estimate:g} passes by `{estimator}`, but made {cost:g} (a backward counts two)")
