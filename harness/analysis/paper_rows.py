"""Numbers that papers print, as data: one CSV per paper in `papers/`, one row per printed number. No torch.

They are shown next to measured rows and never averaged with them: a paper's model, data, steps and encoders differ.
Columns, in the order of the file:

    paper      name of the file, without its ending
    table      the table's number in the paper; in words if it has none, or if others measured the value
    status     how the number was read:
               paper          in the paper itself
               released-code  in output that the authors keep beside their code
               second-hand    in another document that quotes the paper
               third-party    in another work, which measured it: the method run again, or another method next to it
               figure         read off a plot: approximate
    source     where it is printed, in words
    model      the attacked or changed model, as far as it is stated; "real images": no model drew them
    task       the paper's word, from a closed set
    defense    "none": undefended; empty: real images
    attack     empty: not attacked, or the source does not say how
    setting    concept or domain, freezing ratio, number of concepts, steps
    metric     with `direction` and `unit`, the same in all rows of a file
    direction  "higher": a greater value is more similarity or quality as the metric defines it, or more of what a ratio
               such as SGR measures; "lower": less; "none": neither, such as a cost. It does not say what an attacker
               or defender wants: a style metric may be "higher" in a paper that wants it low (its note says so)
    unit       empty: a bare number, or not stated
    value      as printed, with its zeros
    deviation  the value that the source prints after ±; empty: none
    note       doubts about the number, or contradictions elsewhere; empty: none known

A dash in a printed table has no row. Papers whose tables could not be read (MIMA) have no file.
"""

from __future__ import annotations

import csv
import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Status = Literal["paper", "released-code", "second-hand", "third-party", "figure"]
Task = Literal[
    "personalization", "relearning", "adaptation", "generation", "detection", "mitigation", "suppression", "fine-tuning"
]
Direction = Literal["higher", "lower", "none"]

COLUMNS = (
    "paper", "table", "status", "source", "model", "task", "defense", "attack", "setting", "metric", "direction",
    "unit", "value", "deviation", "note",
)  # fmt: skip

_CLOSED = {"status": get_args(Status), "task": get_args(Task), "direction": get_args(Direction)}
_FILLED = ("table", "source", "model", "metric")
_IDENTITY = ("table", "model", "task", "defense", "attack", "setting", "metric")
_REAL = "real images"
_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?", re.ASCII)  # as tables print: no nan, no inf, no exponent


@dataclass(frozen=True)
class PaperRow:
    """One printed number; the module's docstring defines each column."""

    paper: str
    table: str
    status: Status
    source: str
    model: str
    task: Task
    defense: str
    attack: str
    setting: str
    metric: str
    direction: Direction
    unit: str
    value: float
    deviation: float | None
    note: str
    printed: str
    """Value and deviation as the source prints them: "31.60", or "31.60 ± 0.20"."""


def papers() -> list[str]:
    """Return the names of the papers that have a file, sorted."""
    return sorted(file.name.removesuffix(".csv") for file in _folder().iterdir() if file.name.endswith(".csv"))


def load(paper: str | None = None) -> list[PaperRow]:
    """Return the rows of a paper, or of all papers one after another, in the order of the files.

    Raises ValueError for a paper without a file, and for a file with mistakes (see `parse`).
    """
    known = papers()
    if paper is not None and paper not in known:
        raise ValueError(f"no rows of paper '{paper}'; known: {', '.join(known)}")
    rows = []
    for name in known if paper is None else [paper]:
        file = _folder() / f"{name}.csv"
        rows += parse(file.read_text(encoding="utf-8"), file.name)
    return rows


def parse(text: str, file: str) -> list[PaperRow]:
    """Return the rows of a CSV text; `file` is its name, which gives the paper's name.

    Raises ValueError with all mistakes of the file, one per line, each with file and line number.
    """
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    mistakes: list[str] = []
    rows: list[PaperRow] = []
    seen: dict[tuple[str, ...], int] = {}
    metrics: dict[str, tuple[tuple[str, str], int]] = {}
    try:
        header = next(reader, [])
        if tuple(header) != COLUMNS:
            raise ValueError(f"{file}:1: the columns must be {', '.join(COLUMNS)} (got {', '.join(header)})")
        for cells in reader:
            line = reader.line_num
            wrong = _mistakes(cells, file.removesuffix(".csv"))
            if not wrong:
                row = dict(zip(COLUMNS, cells, strict=True))
                first = seen.setdefault(tuple(row[name] for name in _IDENTITY), line)
                if first != line:
                    wrong.append(f"the same number as in line {first}: {', '.join(_IDENTITY)} must distinguish rows")
                about, first = metrics.setdefault(row["metric"], ((row["direction"], row["unit"]), line))
                if about != (row["direction"], row["unit"]):
                    wrong.append(f"direction and unit of '{row['metric']}' differ from those in line {first}")
                rows.append(_row(row))
            mistakes += [f"{file}:{line}: {mistake}" for mistake in wrong]
    except csv.Error as error:
        mistakes.append(f"{file}:{reader.line_num}: {error}")
    if not mistakes and not rows:
        mistakes.append(f"{file}:1: no rows")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return rows


def _folder() -> Traversable:
    return importlib.resources.files("harness.analysis") / "papers"


def _mistakes(cells: list[str], paper: str) -> list[str]:
    """Return the mistakes of a single row."""
    if len(cells) != len(COLUMNS):
        return [f"a row must have {len(COLUMNS)} cells (got {len(cells)})"]
    row = dict(zip(COLUMNS, cells, strict=True))
    wrong = []
    if row["paper"] != paper:
        wrong.append(f"paper must be '{paper}', as the file (got '{row['paper']}')")
    wrong += [f"{name} must not be empty" for name in _FILLED if not row[name].strip()]
    wrong += [
        f"{name} must be one of {', '.join(allowed)} (got '{row[name]}')"
        for name, allowed in _CLOSED.items()
        if row[name] not in allowed
    ]
    if (row["model"] == _REAL) != (not row["defense"]):
        wrong.append(f"defense must be empty where the model is '{_REAL}', and nowhere else (got '{row['defense']}')")
    wrong += [
        f"{name} has blanks around it, doubled blanks or a line break"
        for name in COLUMNS
        if row[name] != _tidy(row[name])
    ]
    if not _NUMBER.fullmatch(row["value"]):
        wrong.append(f"value must be a finite number, as printed (got '{row['value']}')")
    if row["deviation"] and (not _NUMBER.fullmatch(row["deviation"]) or row["deviation"].startswith("-")):
        wrong.append(f"deviation must be empty or a finite number, not negative (got '{row['deviation']}')")
    return wrong


def _tidy(cell: str) -> str:
    return " ".join(cell.split())


def _row(row: Mapping[str, str]) -> PaperRow:
    """Return checked cells as a typed row."""
    deviation = float(row["deviation"]) if row["deviation"] else None
    printed = row["value"] if deviation is None else f"{row['value']} ± {row['deviation']}"
    return PaperRow(**{**row, "value": float(row["value"]), "deviation": deviation, "printed": printed})
