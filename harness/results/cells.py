"""Text cells of CSV files, so that a spreadsheet reads a label as text and never as a formula.

A text that begins with =, +, - or @ (or with a tab or carriage return) gets an apostrophe in front, as spreadsheets
mark text; so does one that begins with apostrophes before such a sign, so that every text is read back unchanged.
Numbers and ranges of numbers such as -1..1 are left alone.
"""

from __future__ import annotations

import re

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_ONE = r"[+-]?(\d+(\.\d+)?|\.\d+)([eE][+-]?\d+)?"
_NUMBER = re.compile(rf"{_ONE}|({_ONE}|-inf)\.\.({_ONE}|inf)")


def to_cell(text: str) -> str:
    """Return a text as it is written."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def from_cell(cell: str) -> str:
    """Return the text of a cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
