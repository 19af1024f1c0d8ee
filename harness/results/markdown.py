"""The only writer of Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from harness.contracts.table import Section

_OPENS_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_RULES = {"l": " --- ", "r": " ---: "}


def page(sections: Sequence[Section], less_than: str = "<") -> str:
    """Return sections as a page of Markdown, with a blank line between its parts.

    Titles, cells and notes are escaped (see `escaped`); paragraphs are not.
    """
    return "\n\n".join(part for section in sections for part in _parts(section, less_than)) + "\n"


def _parts(section: Section, less_than: str) -> Iterator[str]:
    """Yield heading, paragraphs and table of a section."""
    if section.title:
        yield f"{'#' * section.level} {escaped(section.title, less_than)}"
    yield from section.text
    notes = [f"- {escaped(note, less_than)}" for note in section.notes or ()]
    if not section.headers:
        yield from ["\n".join(notes)] if notes else []
        return
    lines = [_row(section.headers, less_than), f"|{'|'.join(_RULES[letter] for letter in section.aligned)}|"]
    lines += [_row(row, less_than) for row in section.rows]
    yield "\n".join(lines if section.notes is None else [*lines, "", *notes])


def _row(cells: Sequence[str], less_than: str) -> str:
    return f"| {' | '.join(escaped(cell, less_than) for cell in cells)} |"


def escaped(text: str, less_than: str = "<") -> str:
    """Return a text escaped so that it cannot end a cell or line, or open a tag.

    `less_than` replaces a "<" that could not open a tag, as in "< 0.001".
    """
    flat = text.replace("|", "\\|").replace("\r", " ").replace("\n", " ")
    flat = _OPENS_TAG.sub("&lt;", flat)
    return flat if less_than == "<" else flat.replace("<", less_than)
