"""A suite: the YAML file that defines what is measured. Read, checked in full, and resolved to plain data.

All mistakes are collected and reported at once, each with file, line, key, value and what to do::

    mini.yaml:14: attacks[1].learning_rte: 'learning_rte' is not a parameter of lora; did you mean 'learning_rate'?

`harness/suite/spec.py` defines its keys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from harness.core.errors import UserMistake, did_you_mean, one_line
from harness.core.paths import SUITES, path_from
from harness.suite import yaml_source
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import PLACES

MAX_TRIALS = 200_000
"""Larger grids are refused as typing mistakes: planning them takes minutes."""


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
    return sorted(SUITES.glob("*.yaml"))


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedSuite:
    """Read and check a suite. Raises UserMistake with every mistake that can be found before compute."""
    from harness.suite import checks, concepts, fetching, general, texts

    loaded, messages, mistakes = _read(path, overrides)
    try:
        loaded.concepts = concepts.resolve_all(loaded)
        loaded.general = general.resolve(loaded)
        mistakes += texts.check(loaded)
        mistakes += checks.after_concepts(loaded)
    except UserMistake as mistake:
        messages += mistake.messages
    if messages and not mistakes and loaded.model is not None:
        messages += fetching.not_here_either(loaded)
    _raise(loaded, messages, mistakes)
    return loaded


def load_without_images(path: Path, overrides: Sequence[str] = ()) -> LoadedSuite:
    """Read and check a suite, but for what is found only with its images: to fetch them. Raises UserMistake."""
    loaded, messages, mistakes = _read(path, overrides)
    _raise(loaded, messages, mistakes)
    return loaded


def _raise(loaded: LoadedSuite, messages: list[str], mistakes: Sequence[Mistake]) -> None:
    messages += _lines(loaded.source, mistakes)
    if messages:
        raise UserMistake(_in_file_order(messages))


def _read(path: Path, overrides: Sequence[str]) -> tuple[LoadedSuite, list[str], list[Mistake]]:
    """Return a suite with its model and parameters, and what is wrong with them."""
    from harness.model.source import resolve_model
    from harness.model.tokens import Tokens
    from harness.suite import checks, form

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
    _replace_places(source)
    suite, mistakes, broken = form.validate(source)
    loaded = LoadedSuite(suite, source, path.resolve().parent)
    loaded.broken = broken
    mistakes += checks.before_concepts(loaded)
    if suite.model is not None:
        try:
            where = source.where(("model",))
            loaded.model = resolve_model(suite.model, where, loaded.folder)
            loaded.tokens = Tokens.of(loaded.model, f"{where}: model")
        except UserMistake as mistake:
            messages += mistake.messages
    return loaded, messages, mistakes


def _replace_places(source: yaml_source.YamlSource) -> None:
    """Let a place of a concept's images that a --set gives take the place of the file's."""
    for section, *rest in source.overrides:
        if section == "concepts" and len(rest) == 2 and rest[1] in PLACES:
            concept = source.data["concepts"][rest[0]]
            for other in PLACES:
                if concept[rest[1]] is not None and (section, rest[0], other) not in source.overrides:
                    concept.pop(other, None)


def _lines(source: yaml_source.YamlSource, mistakes: Sequence[Mistake]) -> list[str]:
    """Return the messages with file, line and key."""
    lines = []
    for path, message in mistakes:
        key = yaml_source.path_text(path)
        lines.append(f"{source.where(path)}: {f'{key}: ' if key else ''}{message}")
    return lines


def _in_file_order(messages: Sequence[str]) -> list[str]:
    """Return the messages sorted by line, without repeats, and at most as many as people read."""

    def line(message: str) -> int:
        found = re.search(r":(\d+): ", message)
        return int(found[1]) if found else 0

    unique = sorted(dict.fromkeys(messages), key=line)
    if len(unique) > MAX_MESSAGES:
        unique[MAX_MESSAGES:] = [f"and {len(unique) - MAX_MESSAGES} more mistakes"]
    return unique


MAX_MESSAGES = 100
