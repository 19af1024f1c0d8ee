"""Exceptions by which a property reports that a method does not satisfy it, or that it does not apply."""

from __future__ import annotations

from typing import Any, NoReturn


class Nonconforming(AssertionError):
    """A method does not satisfy a property; one sentence names the method and its fault."""


class NotApplicable(Exception):
    """A property does not apply to a method; the message gives the reason."""


def fail(method: Any, what: str) -> NoReturn:
    """Raise Nonconforming; the sentence consists of the method's name and `what`."""
    raise Nonconforming(f"{method.name} {what}")
