"""How defenses look in figures: a colour each, and where there are more than colours, other lines and marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's palette, distinguished by readers who do not see all colours, and four of Tol's muted one after it
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442",
    "#882255", "#999933", "#332288", "#44AA99",
)  # fmt: skip
LINES, MARKS = ("-", "--", ":", "-."), "osD^"
"""Of the first dozen, the second, and so on."""


@dataclass(frozen=True)
class Look:
    """Colour, line and mark of a defense."""

    colour: str
    line: str = "-"
    mark: str = "o"


def looks(defenses: Sequence[str], colours: Sequence[str] = COLOURS) -> dict[str, Look]:
    """Return a look for each defense, all different for up to four times as many as there are colours."""
    found = {}
    for index, defense in enumerate(defenses):
        again, place = divmod(index, len(colours))
        found[defense] = Look(colours[place], LINES[again % len(LINES)], MARKS[again % len(MARKS)])
    return found
