"""The only code that prints tables to the terminal, by a rich console."""

from __future__ import annotations

from collections.abc import Sequence

from harness.contracts.table import Section


def show(sections: Sequence[Section], console, before_note: str = "- ") -> None:
    """Print sections to a rich console: tables with their titles, paragraphs dim, notes after `before_note`.

    A heading without a table is printed bold. Text columns are never wrapped, and of others only the headers while the
    terminal is wide enough.
    """
    from rich.table import Table

    for section in sections:
        if section.headers:
            table = Table(title=section.title or None, title_justify="left", pad_edge=False)
            columns = zip(*section.rows, strict=True) if section.rows else [()] * len(section.headers)
            for header, letter, cells in zip(section.headers, section.aligned, columns, strict=True):
                width = max(map(len, cells), default=0)
                is_text = letter == "l"
                table.add_column(header, justify="left" if is_text else "right", no_wrap=is_text, min_width=width)
            for place, row in enumerate(section.rows):
                table.add_row(*row, style="dim" if place in section.faint else None, end_section=place in section.ends)
            console.print(table)
        elif section.title:
            console.print(section.title, style="bold")
        for paragraph in section.text:
            console.print(paragraph, style="dim", highlight=False)
        for note in section.notes or ():
            console.print(f"{before_note}{note}", style="dim" if section.headers else None, highlight=False)


def ends_of_groups(keys: Sequence[object]) -> frozenset[int]:
    """Return the indices of rows whose key differs from the next row's key."""
    return frozenset(place for place in range(len(keys) - 1) if keys[place] != keys[place + 1])
