"""The look of defenses in figures: one colour each; with more defenses than colours, also other lines and markers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's palette, which is safe for colour-blind readers, then four colours of Tol's muted palette
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442",
    "#882255", "#999933", "#332288", "#44AA99",
)  # fmt: skip
LINES, MARKS = ("-", "--", ":", "-."), "osD^"
"""Line and marker of the first dozen of defenses, of the second dozen, and so on."""


@dataclass(frozen=True)
class Look:
    """Colour, line and marker of a defense."""

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
