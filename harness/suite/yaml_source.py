"""Read a YAML file as plain data with the line of every key, and refuse what is bad YAML in one line each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.core.errors import UserMistake, one_line

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
    """The data of a YAML file, and the line of each of its keys and items."""

    name: str  # as the user gave it, for messages
    data: Any
    lines: dict[Path_, int] = field(default_factory=dict)
    overrides: dict[Path_, str] = field(default_factory=dict)  # path -> the text of --set
    removed: set[Path_] = field(default_factory=set)  # what a --set took away
    replaced: list[Any] = field(default_factory=list)  # the values that a --set replaced or took away

    def where(self, path: Sequence[str | int]) -> str:
        """Return "file:line" of the deepest known part of `path`, or the --set that put it there."""
        path = tuple(path)
        for length in range(len(path), -1, -1):
            if path[:length] in self.overrides:
                return f"--set {self.overrides[path[:length]]}"
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name

    def override(self, assignment: str, removable: Sequence[str] = ()) -> None:
        """Apply one `--set key.path=value`; the value is YAML. Raises UserMistake when it does not fit.

        `removable` are keys of which null takes an entry away; everywhere else null is a value.
        """
        about = f"--set {one_line(assignment, 80)}"
        key_path, equals, text = assignment.partition("=")
        if not equals or not key_path.strip():
            raise UserMistake(f"{about}: expected key=value, such as seeds=3")
        value = _parse(text, about)[0]
        steps: list[str | int] = []
        node = self.data
        names = key_path.strip().split(".")
        for depth, name in enumerate(names):
            step: str | int = name
            is_last = depth == len(names) - 1
            if isinstance(node, list) and name.isascii() and name.isdigit() and int(name[:9]) < len(node):
                step = int(name[:9])
            elif not isinstance(node, dict) or not name:
                missing = one_line(".".join(names[: depth + 1]), 80)
                raise UserMistake(f"{about}: '{missing}' is not in {self.name}")
            steps.append(step)
            is_removal = is_last and value is None and len(names) == 2 and steps[0] in removable
            if is_removal and (step not in node or len(node) == 1):
                what = f"is not in {self.name}" if step not in node else f"is all there is of '{steps[0]}'"
                raise UserMistake(f"{about}: '{one_line(key_path.strip(), 80)}' {what}; it cannot be taken away")
            if is_last:
                self.replaced.append(node.get(step) if isinstance(node, dict) else node[step])
            if is_removal:
                del node[step]
                self.removed.add(tuple(steps))
            elif is_last:
                node[step] = value
            elif isinstance(node, dict):
                node = node.setdefault(step, {})
            else:
                node = node[step]
        path = tuple(steps)
        for known in [k for k in self.lines if k[: len(path)] == path]:
            del self.lines[known]  # the lines of what was replaced
        if path not in self.removed:
            self.overrides[path] = one_line(assignment, 80)


def read(path: Path) -> YamlSource:
    """Read one YAML document. Raises UserMistake naming file and line for anything that is not one."""
    name = one_line(path, 300)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserMistake(f"{name}: no such file") from None
    except IsADirectoryError:
        raise UserMistake(f"{name}: is a folder, not a YAML file") from None
    except (OSError, ValueError) as error:
        raise UserMistake(f"{name}: cannot be read: {one_line(getattr(error, 'strerror', None) or error)}") from None
    if len(raw) > MAX_BYTES:
        raise UserMistake(f"{name}: larger than 1 MiB; this is no suite")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserMistake(
            f"{name}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None
    data, lines = _parse(text, name, has_lines=True)
    return YamlSource(name, data, lines)


_PROBLEMS = {
    "found character '\\t' that cannot start any token": "a tab cannot indent; use spaces",
    "special characters are not allowed": "a control character; remove it",
    "but found another document": "a second document begins ('---'); keep one",
    "mapping values are not allowed here": "a ':' where none is allowed; check the indentation, or quote the text",
    "could not find expected ':'": "a key without ':'; check this line and the one before",
    "expected the node content, but found '-'": "a '-' where none is allowed; check the indentation",
    "expected <block end>, but found '-'": "a '-' where none is allowed; check the indentation",
    "expected <block end>, but found '<block mapping start>'": "wrong indentation",
    "expected <block end>, but found '?'": "wrong indentation",
    "expected ',' or ']', but got '<stream end>'": "a '[' is not closed",
    "expected ',' or '}', but got '<stream end>'": "a '{' is not closed",
    "found unexpected end of stream": "a quote is not closed",
}
"""Frequent problems that the YAML reader reports, in plain words; others are reported as they are."""


def _parse(text: str, name: str, *, has_lines: bool = False) -> tuple[Any, dict[Path_, int]]:
    """Return (data, line of every key and item). Raises UserMistake with every mistake that can be found at once."""

    def at(line: int) -> str:
        return f"{name}:{line}" if has_lines else name

    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, {}
            walk = _Walk(at)
            walk.visit(node, ())
            if walk.mistakes:
                raise UserMistake(list(dict.fromkeys(walk.mistakes)))
            data = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserMistake(f"{at(line)}: not valid YAML: {_PROBLEMS.get(error.reason, error.reason)}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "unreadable"
        place = at(mark.line + 1) if mark else name
        raise UserMistake(f"{place}: not valid YAML: {_PROBLEMS.get(problem, one_line(problem))}") from None
    except RecursionError:
        raise UserMistake(f"{name}: not valid YAML: nested too deeply") from None
    except ValueError as error:
        raise UserMistake(f"{name}: not valid YAML: {one_line(error)}") from None
    mistakes: list[str] = []
    _refuse_numbers(data, (), lambda path, words: mistakes.append(f"{at(walk.line_of(path))}: {words}"))
    if mistakes:
        raise UserMistake(list(dict.fromkeys(mistakes)))
    return data, walk.lines


_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
_TAGS = _SCALARS | {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_MERGE = "tag:yaml.org,2002:merge"


class _Walk:
    """Records the line of each key and item of a tree of nodes, and what is wrong with it."""

    def __init__(self, at: Callable[[int], str]):
        self.at = at
        self.lines: dict[Path_, int] = {}
        self.mistakes: list[str] = []
        self._count = 0
        self._above: set[int] = set()  # ids of the nodes that hold the one being visited

    def line_of(self, path: Path_) -> int:
        """Return the line of the deepest known part of `path`."""
        return next(self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines)

    def visit(self, node: yaml.Node, path: Path_) -> None:
        """Visit `node`, which is at `path`, and all below it."""
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > MAX_NODES:
            raise UserMistake(f"{self.at(line)}: more than {MAX_NODES} values; are aliases nested?")
        self.lines.setdefault(path, line)
        if node.tag not in _TAGS:
            self.mistakes.append(f"{self.at(line)}: the tag '{_short(node.tag)}' is not for suites; remove it")
            return
        if id(node) in self._above:
            self.mistakes.append(f"{self.at(line)}: an alias holds itself")
            return
        self._above.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, (*path, index))
        self._above.discard(id(node))

    def _visit_mapping(self, node: yaml.MappingNode, path: Path_) -> None:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistakes.append(f"{self.at(line)}: a key must be plain text, not a list or mapping")
                continue
            if key_node.tag not in ("tag:yaml.org,2002:str", _MERGE):
                kind = _short(key_node.tag)
                self.mistakes.append(
                    f"{self.at(line)}: the key '{one_line(key, 60)}' is read as {kind}, not as text; put it in quotes"
                )
                continue
            if key in seen:
                self.mistakes.append(
                    f"{self.at(line)}: '{one_line(key, 60)}' is listed twice (first on line {seen[key]}); keep one"
                )
            seen.setdefault(key, line)
            self.lines[(*path, key)] = line
            self.visit(value_node, (*path, key))


def _short(tag: str) -> str:
    return one_line(tag.replace("tag:yaml.org,2002:", "!!"), 60)


def _refuse_numbers(value: Any, path: Path_, report: Callable[[Path_, str], None]) -> None:
    """Report numbers that no parameter can be: NaN, infinities, and integers beyond 64 bits."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_numbers(item, (*path, key), report)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_numbers(item, (*path, index), report)
    elif isinstance(value, float) and not math.isfinite(value):
        report(path, f"{path_text(path)}: must be finite (got {value})")
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        report(path, f"{path_text(path)}: a number beyond 64 bits")


def path_text(path: Sequence[str | int]) -> str:
    """Return a path as people write it: attacks[0].steps[2]."""
    parts = (f"[{step}]" if isinstance(step, int) else f".{one_line(step, 60)}" for step in path)
    return "".join(parts).removeprefix(".")
