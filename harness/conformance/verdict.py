"""How a property says that a method does not satisfy it, or that it says nothing about this method."""

from __future__ import annotations

from typing import Any, NoReturn


class Nonconforming(AssertionError):
    """A method does not satisfy a property; one sentence names the method and what it does wrong."""


class NotApplicable(Exception):
    """A property says nothing about a method; the message says why."""


def fail(method: Any, what: str) -> NoReturn:
    """Raise Nonconforming: the method's name and `what` make the sentence."""
    raise Nonconforming(f"{method.name} {what}")
