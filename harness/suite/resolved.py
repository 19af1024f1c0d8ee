"""The copy of a suite in the folder of its run: with defaults and overrides, and such that it can be run again."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from harness.core import registry
from harness.core.errors import one_line
from harness.core.paths import path_from

if TYPE_CHECKING:
    from harness.suite.loaded import LoadedSuite

RESOLVED = "suite.resolved.yaml"
"""The suite including defaults and overrides."""
_PLUGIN = re.compile(r"^# made with --plugin (.+)$", re.MULTILINE)


def text(loaded: LoadedSuite, folder: Path, plugins: Iterable[str] = ()) -> str:
    """Return the suite's copy for the folder of a run.

    Paths that the suite gives relative to its own folder are relative to the run's folder instead. Concepts that only
    parts used which a `--set` left out are not in it: a suite must use what it describes.
    """
    described: dict[str, Any] = loaded.suite.model_dump(mode="json")
    used = set(loaded.suite.concept_names())
    described["concepts"] = {name: concept for name, concept in described["concepts"].items() if name in used}
    if loaded.model is not None and loaded.model.identity["source"] == "folder":
        described["model"]["id"] = _moved(described["model"]["id"], loaded.folder, folder)
    for concept in described["concepts"].values():
        if concept.get("folder") is not None:
            concept["folder"] = _moved(concept["folder"], loaded.folder, folder)
    if loaded.suite.general is not None and loaded.suite.general.folder is not None:
        described["general"]["folder"] = _moved(described["general"]["folder"], loaded.folder, folder)
    for name, task in loaded.suite.tasks.items():
        for *path, last in task.locations():
            entry = described["tasks"][name]
            for step in path:
                entry = entry[step]
            entry[last] = _moved(entry[last], loaded.folder, folder)
    for path, kind, spec in loaded.methods():
        if spec is not None:
            _make_absolute(described, path, kind, loaded)
    head = [f"# resolved from {one_line(Path(loaded.source.name).name)}, with defaults and overrides"]
    head += [f"# made with --plugin {_relative(Path(plugin), folder)}" for plugin in plugins]
    return "\n".join(head) + "\n" + yaml.safe_dump(described, sort_keys=False, allow_unicode=True)


def plugins(file: Path) -> list[str]:
    """Return the plug-ins that a run was made with, as paths that can be given again."""
    try:
        head = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    return [os.path.normpath(file.parent / given) for given in _PLUGIN.findall(head)]


def _moved(given: str, old: Path, new: Path) -> str:
    """Return a path relative to `old` as one relative to `new`; an absolute one stays."""
    if Path(given).expanduser().is_absolute():
        return given
    path = path_from(given, old)
    return given if path is None else _relative(path, new)


def _relative(path: Path, folder: Path) -> str:
    """Return a path relative to a folder; it begins with a dot, so that it cannot be read as a hub id."""
    relative = os.path.relpath(path.resolve(), folder.resolve())
    return relative if relative.startswith(".") else os.path.join(".", relative)


def _make_absolute(described: dict[str, Any], path: Sequence[str | int], kind: str, loaded: LoadedSuite) -> None:
    """Make the paths among a method's parameters absolute: they are relative to the working folder."""
    entry: Any = described
    for step in path:
        entry = entry[step]
    cls, values = registry.get(kind, entry["method"]), loaded.parameters.get(tuple(map(str, path)))
    if values is None or not hasattr(cls, "files"):
        return
    for name, file in cls.files(values).items():
        *outer, inner = name.split(".")
        holder: Any = entry
        for step in outer:
            holder = holder.get(step) or {}
        given = holder.get(inner)
        if isinstance(given, str) and Path(given) == Path(file) and not Path(given).is_absolute():
            holder[inner] = str(Path(given).absolute())
