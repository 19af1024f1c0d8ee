"""A suite: the YAML file that says what is measured. Read, checked in full, and resolved to plain data.

All mistakes are collected and told at once, each with file, line, key, value and what to do::

    mini.yaml:14: attacks[1].learning_rte: 'learning_rte' is not a parameter of lora; did you mean 'learning_rate'?

What it may say: `harness/suite/spec.py`.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.core import parameters
from harness.core.errors import UserMistake, did_you_mean, one_line
from harness.core.paths import path_from
from harness.suite import yaml_source
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import (
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

MAX_TRIALS = 200_000
"""Larger grids are refused: they are slips of the pen, and planning them takes minutes."""


def find(name: str) -> Path:
    """Return the path of a suite: a file, or the name of a bundled one. Raises UserMistake when there is none."""
    path = path_from(name, Path())
    if path is not None and (path.suffix in (".yaml", ".yml") or path.is_file()):
        return path
    bundled = {p.name.removesuffix(".yaml"): p for p in bundled_suites()}
    if name in bundled:
        return bundled[name]
    if path is not None and path.exists():
        return path
    raise UserMistake(f"{one_line(name)}: no such file and no bundled suite{did_you_mean(name, bundled)}")


def bundled_suites() -> list[Path]:
    """Return the suites that ship with the package."""
    folder = Path(str(importlib.resources.files("suites")))
    return sorted(folder.glob("*.yaml"))


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedSuite:
    """Read and check a suite. Raises UserMistake with every mistake that can be found before compute."""
    from harness.model.source import resolve_model
    from harness.suite import checks as suite_checks
    from harness.suite import concepts

    source = yaml_source.read(path)
    if source.data is None:
        raise UserMistake(f"{source.name}: is empty; a suite has the keys name, model, tasks, ...")
    if not isinstance(source.data, dict):
        raise UserMistake(f"{source.where(())}: a suite is a mapping with the keys name, model, tasks, ...")
    messages: list[str] = []
    for assignment in overrides:
        try:
            source.override(assignment, removable=("tasks",))
        except UserMistake as mistake:
            messages += mistake.messages
    suite, mistakes, broken = _validate(source)
    loaded = LoadedSuite(suite, source, path.resolve().parent)
    loaded.broken = broken
    mistakes += suite_checks.resolve_methods(loaded)
    for check in suite_checks.CHECKS:
        mistakes += check(loaded)
    try:
        loaded.concepts = concepts.resolve_all(loaded)
        mistakes += suite_checks.attack_images(loaded) + suite_checks.attack_words(loaded)
        mistakes += suite_checks.probe_prompts(loaded) + suite_checks.scored_concepts(loaded)
    except UserMistake as mistake:
        messages += mistake.messages
    messages += _lines(source, mistakes)
    if suite.model is not None:
        try:
            loaded.model = resolve_model(suite.model, source.where(("model",)), loaded.folder)
        except UserMistake as mistake:
            messages += mistake.messages
    if messages:
        raise UserMistake(_in_file_order(messages))
    return loaded


# -- checks of form ----------------------------------------------------------------------------------------

def _validate(source: yaml_source.YamlSource) -> tuple[Suite, list[Mistake], frozenset[str]]:
    """Return the suite, its mistakes of form and the sections they are in; with mistakes, it holds what is right.

    In such a part-suite a required key that is missing or wrong is None, and so is an entry of a list of methods that
    is wrong, so that the others keep their index.
    """
    try:
        return Suite.model_validate(source.data), [], frozenset()
    except ValidationError as error:
        details = error.errors(include_url=False)
    mistakes = [_mistake(source, detail) for detail in details]
    broken = frozenset(str(detail["loc"][0]) for detail in details)
    parts: dict[str, Any] = {"model": None}
    for name, field in Suite.model_fields.items():
        given = source.data.get(name)
        if name in METHOD_SECTIONS:
            entries = given if isinstance(given, list) else []
            parts[name] = [_valid(METHOD_SPECS[name], entry) for entry in entries[:1000]]
        elif name in ("tasks", "concepts"):
            key_form, spec = (Label, TaskSpec) if name == "tasks" else (ConceptName, ConceptSpec)
            entries = given if isinstance(given, dict) else {}
            checked = {k: _valid(spec, entry) for k, entry in entries.items() if _valid(key_form, k) is not None}
            parts[name] = {key: entry for key, entry in checked.items() if entry is not None}
        elif name in source.data:
            checked = _valid(field.annotation, _by_short_form(name, given))
            if checked is not None:
                parts[name] = checked
        if name not in parts:
            parts[name] = field.get_default(call_default_factory=True) if not field.is_required() else None
    return Suite.model_construct(**parts), mistakes, broken


def _by_short_form(name: str, value: Any) -> Any:
    """Return `value` as the field validators of `Suite` would hand it on."""
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
    """Return `value` as `annotation` says, or None when it is not of that form."""
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError:
        return None


def _mistake(source: yaml_source.YamlSource, detail: Mapping[str, Any]) -> Mistake:
    """Return (path, message) of one of pydantic's errors, in our words."""
    # pydantic names more places than there are in the file, such as that of a concept written without brackets
    path: tuple = ()
    node: Any = source.data
    for step in detail["loc"]:
        is_there = step in node if isinstance(node, dict) else isinstance(node, list) and isinstance(step, int)
        if is_there:
            path, node = (*path, step), node[step]
        elif detail["type"] == "missing" and step == detail["loc"][-1]:
            return path, f"the key '{step}' is missing"
    if detail["type"] == "extra_forbidden":
        return path, f"unknown key{did_you_mean(path[-1], _keys_beside(path))}"
    return path, parameters.explain(detail, PATTERN_WORDS)


def _keys_beside(path: tuple) -> Sequence[str]:
    """Return the keys that are known where the last step of `path` stands."""
    if len(path) == 1:
        return list(Suite.model_fields)
    if path[0] == "tasks":
        return list(TaskSpec.model_fields)
    if path[0] == "concepts" and path[-2] != "generate":
        return list(ConceptSpec.model_fields)
    spec = SPEC_BY_KEY.get(str(path[-2]))
    return list(spec.model_fields) if spec else []


def _lines(source: yaml_source.YamlSource, mistakes: Sequence[Mistake]) -> list[str]:
    """Return the messages with file, line and key."""
    lines = []
    for path, message in mistakes:
        key = yaml_source.path_text(path)
        lines.append(f"{source.where(path)}: {f'{key}: ' if key else ''}{message}")
    return lines


def _in_file_order(messages: Sequence[str]) -> list[str]:
    """Return the messages by line, without repeats, and not more than people read."""

    def line(message: str) -> int:
        found = re.search(r":(\d+): ", message)
        return int(found[1]) if found else 0

    unique = sorted(dict.fromkeys(messages), key=line)
    if len(unique) > MAX_MESSAGES:
        unique[MAX_MESSAGES:] = [f"and {len(unique) - MAX_MESSAGES} more mistakes"]
    return unique


MAX_MESSAGES = 100
