"""Exceptions for methods that lack a property, and for properties that do not apply to a method."""

from __future__ import annotations

from typing import Any, NoReturn


class Nonconforming(AssertionError):
    """A method lacks a property; one sentence names the method and what it does wrong."""


class NotApplicable(Exception):
    """A property does not apply to a method; the message gives the reason."""


def fail(method: Any, what: str) -> NoReturn:
    """Raise Nonconforming: the method's name and `what` make the sentence."""
    raise Nonconforming(f"{method.name} {what}")
