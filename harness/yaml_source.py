"""Read a YAML file as plain data with the line of every key, and refuse what is bad YAML in one line each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UserMistake, one_line

MAX_BYTES = 1 << 20
MAX_NODES = 200_000  # an alias counts each time: nested aliases cannot grow without bound

Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does, and dates as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass
class YamlSource:
    """The data of a YAML file, and where each of its keys and items stands."""

    name: str  # as the user gave it, for messages
    data: Any
    lines: dict[Path_, int] = field(default_factory=dict)
    overrides: dict[Path_, str] = field(default_factory=dict)  # path -> the text of --set

    def where(self, path: Sequence[str | int]) -> str:
        """Return "file:line" of the deepest known part of `path`, or the --set that put it there."""
        path = tuple(path)
        for length in range(len(path), -1, -1):
            if path[:length] in self.overrides:
                return f"--set {self.overrides[path[:length]]}"
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name

    def override(self, assignment: str) -> None:
        """Apply one `--set key.path=value`; the value is YAML. Raises UserMistake when it does not fit."""
        key_path, equals, text = assignment.partition("=")
        if not equals or not key_path.strip():
            raise UserMistake(f"--set {one_line(assignment)}: expected key=value, such as seeds=3")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise UserMistake(f"--set {one_line(assignment)}: the value is not YAML") from None
        steps: list[str | int] = [int(s) if s.isdigit() else s for s in key_path.strip().split(".")]
        node = self.data
        for depth, step in enumerate(steps[:-1]):
            if isinstance(node, dict) and step not in node:
                node[step] = {}
            try:
                node = node[step]
            except (KeyError, IndexError, TypeError):
                raise UserMistake(
                    f"--set {one_line(assignment)}: '{'.'.join(map(str, steps[: depth + 1]))}' is not in {self.name}"
                ) from None
        try:
            node[steps[-1]] = value
        except (IndexError, TypeError):
            raise UserMistake(
                f"--set {one_line(assignment)}: '{'.'.join(map(str, steps))}' is not in {self.name}"
            ) from None
        self.overrides[tuple(steps)] = one_line(assignment, 80)


def read(path: Path) -> YamlSource:
    """Read one YAML document. Raises UserMistake naming file and line for anything that is not one."""
    name = str(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserMistake(f"{name}: larger than 1 MiB; this is no suite")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserMistake(f"{name}: no such file") from None
    except IsADirectoryError:
        raise UserMistake(f"{name}: is a folder, not a YAML file") from None
    except OSError as error:
        raise UserMistake(f"{name}: cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserMistake(
            f"{name}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            mistakes: list[str] = []
            lines: dict[Path_, int] = {}
            if node is not None:
                _walk(node, (), lines, mistakes, name, [0])
            if mistakes:
                raise UserMistake(mistakes)
            data = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        hint = "; indent with spaces, not tabs" if "\\t" in str(problem) else ""
        raise UserMistake(f"{place}: not valid YAML: {one_line(problem)}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserMistake(f"{name}: not valid YAML: {one_line(error)}") from None
    return YamlSource(name, data, lines)


def _walk(
    node: yaml.Node, path: Path_, lines: dict[Path_, int], mistakes: list[str], name: str, count: list[int]
) -> None:
    """Record the line of each key and item below `node`, and the keys that stand twice."""
    count[0] += 1
    if count[0] > MAX_NODES:
        raise UserMistake(f"{name}:{node.start_mark.line + 1}: more than {MAX_NODES} values; are aliases nested?")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                mistakes.append(f"{name}:{line}: a key must be plain text")
                continue
            key = key_node.value
            if key in seen:
                mistakes.append(
                    f"{name}:{line}: '{one_line(key, 60)}' stands twice (first on line {seen[key]}); keep one"
                )
            seen[key] = line
            lines[(*path, key)] = line
            _walk(value_node, (*path, key), lines, mistakes, name, count)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), lines, mistakes, name, count)
