"""Check all properties of a method in turn, with one line of result each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from harness.conformance import attacks, defenses
from harness.conformance.setting import Setting
from harness.conformance.verdict import Nonconforming, NotApplicable
from harness.core.errors import one_line

PROPERTIES: dict[str, tuple[Callable[[Any, Setting], None], ...]] = {
    "defense": defenses.PROPERTIES,
    "preparation": defenses.PROPERTIES,
    "attack": attacks.PROPERTIES,
}
"""Properties by kind of method; other kinds have none."""


@dataclass(frozen=True)
class Line:
    """The result of one property for one method."""

    verdict: Literal["ok", "failed", "not applicable"]
    property: str
    why: str  # "" if it is satisfied
    seconds: float

    def __str__(self) -> str:
        """Return the line: verdict, property, time, and why."""
        said = f"{self.verdict:<15} {self.property} ({self.seconds:.1f} s)"
        return f"{said}: {self.why}" if self.why else said


def lines(kind: str, method: Any, setting: Setting) -> Iterator[Line]:
    """Check every property of a method; yield a line as soon as one is known."""
    for check in PROPERTIES[kind]:
        started = time.monotonic()
        verdict, why = checked(check, method, setting)
        yield Line(verdict, check.__name__.replace("_", " "), why, time.monotonic() - started)


def checked(
    check: Callable[[Any, Setting], None], method: Any, setting: Setting
) -> tuple[Literal["ok", "failed", "not applicable"], str]:
    """Return (verdict, why) of one property; any exception from the method counts as failed."""
    try:
        check(method, setting)
    except Nonconforming as failure:
        return "failed", one_line(failure, 400)
    except NotApplicable as reason:
        return "not applicable", one_line(reason, 400)
    except Exception as error:
        return "failed", one_line(f"{method.name} raises {type(error).__name__}: {error}", 400)
    return "ok", ""
