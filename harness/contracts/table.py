"""Tables and figures as data: the content, apart from how Markdown, LaTeX, CSV or a terminal write it.

A `Table` holds the same content twice: lines with columns for machines (CSV), and sections of text for people. A
table has plain text; the writers in `harness/results/` escape it for their format. A figure has a function that draws
it. No torch and no pandas here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Section:
    """A part of a page for people: a heading, paragraphs, a table and notes below it. What is empty is left out."""

    title: str = ""
    text: tuple[str, ...] = ()
    """Paragraphs between heading and table: our own words. Markdown takes them as they are."""
    headers: tuple[str, ...] = ()
    """One for each column; (): no table."""
    rows: Sequence[Sequence[str]] = ()
    """The cells of each row, as many as headers."""
    alignments: str = ""
    """A letter for each column: l (words) or r (numbers). "": words first, then numbers."""
    notes: tuple[str, ...] | None = None
    """List items below the table. (): the table has none, and a line is left free for them."""
    level: int = 2
    """Of the heading: 1 is the title of a page."""
    faint: Collection[int] = frozenset()
    """Rows that do not count, by their place: a terminal shows them dim."""
    ends: Collection[int] = frozenset()
    """Rows that end a group, by their place: a terminal draws a line below them."""

    def __post_init__(self) -> None:
        """Raise ValueError where rows or alignments do not fit the headers."""
        columns = len(self.headers)
        if any(len(row) != columns for row in self.rows):
            raise ValueError(f"section '{self.title}': a row has not as many cells as there are headers ({columns})")
        if self.alignments and (len(self.alignments) != columns or set(self.alignments) - {"l", "r"}):
            raise ValueError(f"section '{self.title}': alignments must be one of l and r for each of {columns} headers")

    @property
    def aligned(self) -> str:
        """The letter of each column."""
        return self.alignments or "l" + "r" * (len(self.headers) - 1)


@dataclass(frozen=True)
class Table:
    """A table of a run, written as NAME.csv (where it has columns) and NAME.md (where it has sections)."""

    name: str
    """Of its files, without an ending: lower-case letters, digits and "_"."""
    columns: tuple[str, ...] = ()
    """Of the CSV file, in order."""
    lines: Sequence[Mapping[str, Any]] = ()
    """Each has all columns: text, numbers, booleans, or None where a value is not defined."""
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class Figure:
    """A figure of a run, written as NAME.png."""

    name: str
    """Of its file, without an ending: lower-case letters, digits and "_"."""
    draw: Callable[[Path], bool]
    """Draws the file (PNG) at a path; returns False where there is nothing to draw."""
