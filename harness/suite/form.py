"""Check the form of a suite: wrong types, unknown and missing keys are reported in our words, with their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.core import parameters, registry
from harness.core.errors import did_you_mean, one_line
from harness.suite.loaded import Mistake
from harness.suite.spec import (
    DEFAULT_TASK,
    METHOD_SECTIONS,
    METHOD_SPECS,
    PATTERN_WORDS,
    SPEC_BY_KEY,
    ConceptName,
    ConceptSpec,
    Label,
    Suite,
    TaskSpec,
)
from harness.suite.yaml_source import YamlSource


def validate(source: YamlSource) -> tuple[Suite, list[Mistake], frozenset[str]]:
    """Return the suite, its mistakes of form and their sections; with mistakes, the suite holds only its correct parts.

    In such a partial suite a required key that is missing or wrong is None. So is a wrong entry in a list of methods,
    so that the others keep their index.
    """
    tasks, details = _tasks(source)
    try:
        suite = Suite.model_validate(source.data)
    except ValidationError as error:
        details = [*error.errors(include_url=False), *details]
    if not details:
        return suite.model_copy(update={"tasks": tasks}), [], frozenset()
    mistakes = [_mistake(source, detail) for detail in details]
    broken = frozenset(str(detail["loc"][0]) for detail in details)
    parts: dict[str, Any] = {"model": None}
    for name, field in Suite.model_fields.items():
        given = source.data.get(name)
        if name in METHOD_SECTIONS:
            entries = given if isinstance(given, list) else []
            parts[name] = [_valid(METHOD_SPECS[name], entry) for entry in entries[:1000]]
        elif name == "tasks":
            parts[name] = {key: entry for key, entry in tasks.items() if _valid(Label, key) is not None}
        elif name == "concepts":
            entries = given if isinstance(given, dict) else {}
            checked = {k: _valid(ConceptSpec, v) for k, v in entries.items() if _valid(ConceptName, k) is not None}
            parts[name] = {key: entry for key, entry in checked.items() if entry is not None}
        elif name in source.data:
            checked = _valid(field.annotation, _by_short_form(name, given))
            if checked is not None:
                parts[name] = checked
        if name not in parts:
            parts[name] = field.get_default(call_default_factory=True) if not field.is_required() else None
    return Suite.model_construct(**parts), mistakes, broken


def _tasks(source: YamlSource) -> tuple[dict[str, TaskSpec], list[dict[str, Any]]]:
    """Return the entries under `tasks`, each in the form of its kind, and pydantic's errors for the wrong ones."""
    given = source.data.get("tasks")
    tasks: dict[str, TaskSpec] = {}
    details: list[dict[str, Any]] = []
    for name, entry in given.items() if isinstance(given, dict) else ():
        form = _form_of_task(entry)
        if form is None:
            kinds = registry.names("task")
            what = f"unknown kind of task '{one_line(entry['kind'], 60)}'{did_you_mean(entry['kind'], kinds)}"
            details.append({"type": "value_error", "loc": ("tasks", name, "kind"), "msg": what, "ctx": {"error": what}})
            continue
        try:
            tasks[name] = form.model_validate(entry)
        except ValidationError as error:
            details += [{**d, "loc": ("tasks", name, *d["loc"])} for d in error.errors(include_url=False)]
    return tasks, details


def _form_of_task(entry: Any) -> type[TaskSpec] | None:
    """Return the form of an entry under `tasks`; None for an unknown kind."""
    kind = entry.get("kind", DEFAULT_TASK) if isinstance(entry, dict) else DEFAULT_TASK
    if not isinstance(kind, str):
        return TaskSpec  # its errors say that kind must be text
    return registry.get("task", kind).Spec if kind in registry.names("task") else None


def _by_short_form(name: str, value: Any) -> Any:
    """Return `value` as the field validators of `Suite` convert it."""
    try:
        if name == "model":
            return Suite.model_by_name(value)
        if name == "seeds":
            return Suite.seeds_by_count(value)
    except ValueError:
        pass
    return value


_adapter = lru_cache(maxsize=64)(TypeAdapter)


def _valid(annotation: Any, value: Any) -> Any:
    """Return `value` converted to `annotation`, or None when it does not have that form."""
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError:
        return None


def _mistake(source: YamlSource, detail: Mapping[str, Any]) -> Mistake:
    """Return (path, message) of one of pydantic's errors, in our words."""
    # pydantic's place may have steps that are not in the file, such as for a concept written without brackets
    path: tuple = ()
    node: Any = source.data
    for step in detail["loc"]:
        is_there = step in node if isinstance(node, dict) else isinstance(node, list) and isinstance(step, int)
        if is_there:
            path, node = (*path, step), node[step]
        elif detail["type"] == "missing" and step == detail["loc"][-1]:
            return path, f"the key '{step}' is missing"
    if detail["type"] == "extra_forbidden":
        return path, f"unknown key{did_you_mean(path[-1], _keys_beside(source, path))}"
    return path, parameters.explain(detail, PATTERN_WORDS)


def _keys_beside(source: YamlSource, path: tuple) -> Sequence[str]:
    """Return the keys that are known at the last step of `path`."""
    if len(path) == 1:
        return list(Suite.model_fields)
    if path[0] == "tasks":
        form = _form_of_task(source.data["tasks"][path[1]])
        return list(form.model_fields) if form else []
    if path[0] == "concepts" and path[-2] not in SPEC_BY_KEY:
        return list(ConceptSpec.model_fields)
    spec = SPEC_BY_KEY.get(str(path[-2]))
    return list(spec.model_fields) if spec else []
