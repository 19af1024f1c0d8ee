"""Frozen dataclasses as JSON and back: how typed parameters of a stage enter its identity, its record and a worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Described = Mapping[str, Any]
"""JSON values by name: a method's own parameters, as everything but the method handles them."""
Typed = TypeVar("Typed")
_LEFT_OUT = "left out while None"


def optional() -> Any:
    """Return a dataclass field that is None unless given, and part of the JSON only when given."""
    return dataclasses.field(default=None, metadata={_LEFT_OUT: True})


def as_json(value: Any) -> Any:
    """Return a value as JSON values: dataclasses and mappings become dicts, tuples become lists."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: as_json(given)
            for field in dataclasses.fields(value)
            if (given := getattr(value, field.name)) is not None or _LEFT_OUT not in field.metadata
        }
    if isinstance(value, Mapping):
        return {str(name): as_json(given) for name, given in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(given) for given in value]
    return value


def typed(cls: type[Typed], described: Any) -> Typed:
    """Return the instance of a dataclass that `as_json` described. Raises pydantic's ValidationError otherwise."""
    return _adapter(cls).validate_python(described)


@lru_cache(maxsize=64)
def _adapter(cls: type) -> TypeAdapter:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)
