"""The report's sections from registered diagnostics: each is rendered, or listed as failed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts.diagnostic import PageSection
from harness.results import tables
from harness.results.diagnostics import Diagnostics

if TYPE_CHECKING:
    from harness.report.run_folder import RunFolder

_ANCHOR = re.compile(r"[a-z][a-z0-9-]{0,39}")
_FILE = re.compile(r"[a-z0-9_]{1,60}\.(csv|png)")
_TAKEN = frozenset(
    {"short", "leaderboard", "soon", "curves", "plane", "images", "further", "validity", "costs", "provenance",
     "ledger", "definitions"}
)  # fmt: skip
"""Anchors of the page's own sections; it also uses anchors that begin with `task-` and `validity-`."""


@dataclass(frozen=True)
class OwnSection:
    """A section in the form that the page shows."""

    title: str
    anchor: str
    body: Any
    """Markup: the rendered template, which the page does not escape again."""
    figures: tuple[str, ...]
    data: tuple[str, ...]


def of_run(run: RunFolder, environment: Any) -> tuple[list[OwnSection], list[tuple[str, str]]]:
    """Return the sections of a run folder, and (diagnostic, error) of those that failed, here or in the tables."""
    diagnostics = Diagnostics()
    made: list[OwnSection] = []
    for diagnostic, section in diagnostics.ask(lambda known: known.section(run.path)):
        taken = _TAKEN | {other.anchor for other in made}
        rendered = diagnostics.attempt(
            diagnostic.name,
            lambda section=section, taken=taken: _rendered(section, taken, environment),
            None,
        )
        made += [] if rendered is None else [rendered]
    failed = dict(tables.failures(run.path))
    failed |= {name: failure.error for name, failure in diagnostics.failures.items()}
    return made, list(failed.items())


def _rendered(section: PageSection, taken: frozenset[str], environment: Any) -> OwnSection:
    """Return a section with its template rendered. Raises ValueError for an invalid anchor or file."""
    from markupsafe import Markup

    is_taken = section.anchor in taken or section.anchor.startswith(("task-", "validity-"))
    if is_taken or not _ANCHOR.fullmatch(section.anchor):
        raise ValueError(f"the anchor {section.anchor!r} is taken, or not of lower-case letters, digits and '-'")
    for name in (*section.figures, *section.data):
        if not _FILE.fullmatch(name):
            raise ValueError(f"{name!r} is no table or figure of a run folder")
    body = Markup(environment.from_string(section.template).render(section.context))
    return OwnSection(section.title, section.anchor, body, tuple(section.figures), tuple(section.data))
