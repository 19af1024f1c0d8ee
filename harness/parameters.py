"""Parameters of a method: a frozen dataclass, checked in full before any compute.

Defaults are the paper's. `presets` of a method name other sets of values (the testbed's rates, an example script's);
a value in the suite beats the preset, which beats the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from harness.errors import did_you_mean, one_line
from harness.identity import is_finite_json


def resolve(cls: type, given: Mapping[str, Any], preset: str | None = None) -> tuple[Any, list[tuple[str, str]]]:
    """Return (parameters, mistakes) of the method class `cls`: mistakes are (field name or "", message).

    `parameters` is an instance of `cls.Parameters`, or None when there are mistakes.
    """
    from pydantic import TypeAdapter, ValidationError

    fields = {f.name: f for f in dataclasses.fields(cls.Parameters)}
    mistakes = [
        (name, f"'{one_line(name, 60)}' is not a parameter of {cls.name}{did_you_mean(name, fields)}")
        for name in given
        if name not in fields
    ]
    presets: Mapping[str, Mapping[str, Any]] = getattr(cls, "presets", {})
    values: dict[str, Any] = {}
    if preset is not None:
        if preset in presets:
            values.update(presets[preset])
        else:
            mistakes.append(
                ("preset", f"{cls.name} has no preset '{one_line(preset, 60)}'{did_you_mean(preset, presets)}")
            )
    values.update({name: value for name, value in given.items() if name in fields})
    mistakes += [(n, f"'{n}' must be finite") for n, v in values.items() if not is_finite_json(v)]
    if mistakes:
        return None, mistakes
    try:
        return TypeAdapter(cls.Parameters).validate_python(values), []
    except ValidationError as error:
        for detail in error.errors():
            name = str(detail["loc"][0]) if detail["loc"] else ""
            mistakes.append((name, f"{f'{name!r}: ' if name else ''}{explain(detail)}"))
        return None, mistakes


def explain(detail: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors in our words, with the value that was got."""
    message = detail["msg"]
    message = message.removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = detail.get("input")
    if detail["type"] in ("missing", "value_error") or isinstance(got, Mapping):
        return one_line(message, 300)
    return one_line(f"{message} (got {one_line(repr(got), 60)})", 300)


def as_json(parameters: Any) -> dict[str, Any]:
    """Return the parameters as JSON values, for the identity of a stage (tuples become lists)."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): convert(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(v) for v in value]
        return value

    return convert(dataclasses.asdict(parameters))
