"""Rooms and arrows: a room imports only from rooms on lower floors. Read from every import, also those in functions."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("store", "analysis", "model", "testbed"),
    ("suite",),
    ("contracts",),
    ("training",),
    ("stages",),
    ("plan",),
    ("executors", "results"),
    ("conformance", "report", "tasks", "defenses", "attacks", "metrics"),
    ("commands",),
)
"""From the bottom up. Rooms without a prefix are folders of harness/, but for the packages of methods."""
METHODS = ("defenses", "attacks", "metrics")
ROOT_MODULES = {"__init__", "__main__", "api", "cli"}
"""What is at the root of harness/: above all floors, and imported by nothing but each other."""


def room(module: str) -> str:
    """Return the room of a dotted module name; "" for the root of harness/."""
    first, _, rest = module.partition(".")
    if first in METHODS:
        return first
    inner = rest.partition(".")[0]
    return "" if inner in ROOT_MODULES or not inner else inner


def imported(path: Path) -> list[tuple[int, str]]:
    """Return (line, module) of every import of ours in a file, wherever it is written."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if exists(name) else node.module) for name in inside]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import hides its room"
    return [(line, name) for line, name in found if name.partition(".")[0] in ("harness", *METHODS)]


def exists(module: str) -> bool:
    """Return whether a dotted name is a module of ours."""
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def modules() -> dict[str, Path]:
    """Return every module of ours by its dotted name."""
    files = [path for top in ("harness", *METHODS) for path in sorted((ROOT / top).rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def arrows() -> dict[tuple[str, str], list[str]]:
    """Return (from room, to room) -> "file:line" of the imports between different rooms."""
    found = defaultdict(list)
    for name, path in modules().items():
        for line, other in imported(path):
            pair = room(name), room(other)
            if pair[0] != pair[1]:
                found[pair].append(f"{path.relative_to(ROOT)}:{line} imports {other}")
    return found


def test_every_room_is_in_the_table():
    """A new folder needs a place, and no place is left of an old one."""
    there = {room(name) for name in modules()} - {""}

    assert there == {name for floor in FLOORS for name in floor}


def test_the_root_holds_its_four_modules():
    """Rooms are folders."""
    assert {path.stem for path in (ROOT / "harness").glob("*.py")} == ROOT_MODULES


def test_no_arrow_runs_up():
    """Nor along a floor: rooms beside each other do not know each other."""
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor} | {"": len(FLOORS)}
    wrong = [place for (one, other), places in arrows().items() if floor_of[one] <= floor_of[other] for place in places]

    assert wrong == []


def test_at_most_ten_floors():
    """The house is no tower."""
    assert len(FLOORS) <= 10


def test_modules_form_no_circle():
    """Also inside a room, no module needs itself; what only types need counts too."""
    known = modules()
    graph = {
        name: {other for _, full in imported(path) if (other := nearest(full, known)) != name}
        for name, path in known.items()
    }

    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def nearest(name: str, known: dict[str, Path]) -> str:
    """Return the module that a dotted name is, or is defined in."""
    while name not in known:
        name = name.rpartition(".")[0]
    return name


def test_no_room_imports_a_method_by_name():
    """Methods are found by the registry: bundled ones through the same door as those of others."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for name, path in modules().items()
        if room(name) not in METHODS
        for line, other in imported(path)
        if room(other) in METHODS
    ]

    assert wrong == []
