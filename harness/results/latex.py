"""The only writer of LaTeX tables for papers (package booktabs)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.contracts.table import Section

_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}",
    "\n": " ",
}  # fmt: skip


def page(sections: Sequence[Section]) -> str:
    """Return a table environment for each section with a table; paragraphs become comments, notes are left out."""
    parts = ["% needs \\usepackage{booktabs}"]
    for section in sections:
        if section.headers:
            parts += _table(section)
        for paragraph in section.text:
            parts += [f"% {line}" for line in re.findall(r".{1,110}(?:\s|$)", paragraph)]
    return "\n".join([*parts, ""])


def _table(section: Section) -> list[str]:
    return [
        r"\begin{table}",
        rf"\caption{{{escaped(section.title)}}}",
        rf"\begin{{tabular}}{{{section.aligned}}}",
        r"\toprule",
        _row(section.headers),
        r"\midrule",
        *(_row(row) for row in section.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ]


def _row(cells: Sequence[str]) -> str:
    return " & ".join(escaped(cell) for cell in cells) + r" \\"


def escaped(text: str) -> str:
    """Return a text with LaTeX's special characters escaped."""
    return "".join(_ESCAPES.get(character, character) for character in text)
