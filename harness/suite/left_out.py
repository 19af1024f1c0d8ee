"""Which `--set` leaves parts of a suite out, for people who cannot have what these parts need."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

import yaml

from harness.suite.loaded import LoadedSuite
from harness.suite.spec import METHOD_SECTIONS


def option(loaded: LoadedSuite, paths: Iterable[tuple]) -> str | None:
    """Return the options that leave out all parts at `paths`; None where the rest would be no suite."""
    tasks: dict[str, None] = {}
    entries: dict[str, set[int]] = {}
    for path in paths:
        if path[0] == "concepts":
            if path[1] in loaded.suite.utility:
                return None
            tasks |= {name: None for name, task in loaded.suite.tasks.items() if path[1] in task.concept_names()}
        elif path[0] == "tasks":
            tasks[path[1]] = None
        elif path[0] in METHOD_SECTIONS:
            entries.setdefault(path[0], set()).add(path[1])
        else:
            return None
    if tasks.keys() == loaded.suite.tasks.keys():
        return None
    options = [f"tasks.{name}=null" for name in tasks]
    for section, indices in entries.items():
        rest = [entry for index, entry in enumerate(loaded.source.data[section]) if index not in indices]
        if not rest:
            return None
        text = yaml.safe_dump(rest, default_flow_style=True, width=10_000, sort_keys=False).strip()
        options.append(f"{section}={text}")
    return " ".join(f"--set {shlex.quote(text)}" for text in options) or None
