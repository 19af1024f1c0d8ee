"""Parameters of a method: a frozen dataclass, checked in full before any compute.

Defaults are the paper's. A method's `presets` name other sets of values (for the testbed, or from an example script).
A value in the suite overrides the preset, and the preset overrides the default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness.core.errors import did_you_mean, one_line
from harness.core.identity import is_finite_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def resolve(
    cls: type, given: Mapping[str, Any], preset: str | None = None, beside: Iterable[str] = ()
) -> tuple[Any, list[tuple[str, str]]]:
    """Return (parameters, mistakes) of the method class `cls`: mistakes are (field name or "", message).

    `parameters` is an instance of `cls.Parameters`, or None when there are mistakes. Types are strict: neither "4" nor
    true is a number. `beside`: keys allowed next to the parameters, for "did you mean" suggestions.
    """
    from pydantic import PydanticUndefinedAnnotation, PydanticUserError, ValidationError

    fields = {f.name: f for f in dataclasses.fields(cls.Parameters)}
    mistakes = [
        (name, f"'{one_line(name, 60)}' is not a parameter of {cls.name}{did_you_mean(name, [*fields, *beside])}")
        for name in given
        if name not in fields
    ]
    presets: Mapping[str, Mapping[str, Any]] = getattr(cls, "presets", {})
    values: dict[str, Any] = {}
    if preset is not None:
        if preset in presets:
            values.update(presets[preset])
        else:
            hint = did_you_mean(preset, presets) or "; it has none"
            mistakes.append(("preset", f"{cls.name} has no preset '{one_line(preset, 60)}'{hint}"))
    values.update({name: value for name, value in given.items() if name in fields})
    for name, value in values.items():
        if not is_finite_json(value):
            mistakes.append((name, f"must be finite (got {one_line(value, 60)})"))
    finite = {name: value for name, value in values.items() if is_finite_json(value)}
    try:
        # through JSON: strict mode then accepts a list as a tuple and 1 as 1.0, but no text and no boolean as a number
        parameters = _adapter(cls.Parameters).validate_json(json.dumps(finite), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = str(detail["loc"][0]) if detail["loc"] else ""
            mistakes.append((name, _inside(detail, finite.get(name)) + explain(detail)))
    except (PydanticUserError, PydanticUndefinedAnnotation, TypeError) as error:
        mistakes.append(("", f"the Parameters of {cls.name} cannot be checked: {one_line(error)}"))
    else:
        if not mistakes:
            return parameters, []
    return None, mistakes


def _inside(detail: Mapping[str, Any], given: Any) -> str:
    """Return which entry of a parameter that is a mapping an error is of, as "bound: "; "" for other parameters."""
    keys = [str(key) for key in detail["loc"][1:]] if isinstance(given, Mapping) else []
    return f"{'.'.join(keys)}: " if keys else ""


@lru_cache(maxsize=256)
def _adapter(form: type) -> TypeAdapter:
    from pydantic import TypeAdapter

    return TypeAdapter(form)


_WORDS: dict[str, str] = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping (key: value)",
    "finite_number": "must be finite",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping (key: value)",
    "none_required": "must be null",
    "string_too_long": "must be at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "unexpected_keyword_argument": "is not a known key",
}
"""pydantic's errors in words that need no knowledge of Python."""


def explain(detail: Mapping[str, Any], pattern_words: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return one of pydantic's errors in our words, with the value that was given.

    `pattern_words`: regular expression -> a description of the texts that it accepts.
    """
    kind, context, got = detail["type"], detail.get("ctx", {}), detail.get("input")
    if kind == "value_error":
        return one_line(context.get("error", detail["msg"]), 300)
    if kind == "missing":
        return "is missing"
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"must hold {bound} (got {context.get('actual_length')})"
    if kind == "string_pattern_mismatch":
        message = pattern_words.get(context["pattern"], f"must match {context['pattern']}")
    elif kind in _WORDS:
        message = _WORDS[kind].format(**context)
    else:
        message = detail["msg"][0].lower() + detail["msg"][1:]
    hint = "; put it in quotes" if kind == "string_type" and isinstance(got, (bool, int, float)) else ""
    return one_line(f"{message} (got {_show(got)}){hint}", 300)


def _show(value: Any) -> str:
    """Return a value as written in YAML, shortened."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, str):
        return f"'{one_line(value, 60)}'"
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else one_line(value, 60)
