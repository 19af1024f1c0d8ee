"""The look of defenses in figures: a colour that a defense keeps in every run, as far as the others leave it free.

The undefended model and the bundled methods have fixed colours. Any other label prefers the colours in an order that its
digest gives, and gets the first one that is free, so the result does not depend on the order in the run. With more
defenses than colours, lines and markers differ too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Okabe and Ito's palette, which is safe for colour-blind readers, then four colours of Tol's muted palette
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442",
    "#882255", "#999933", "#332288", "#44AA99",
)  # fmt: skip
FIXED = (
    "none", "imma", "uce", "mima", "freezeasguard", "random_freeze", "esd", "mixed_finetune", "joint", "merged",
    "freeze_component",
)  # fmt: skip
"""Labels with a colour of COLOURS each, in its order: the bundled methods under their own names."""
LINES, MARKS = ("-", "--", ":", "-."), "osD^"
"""Line and marker of the first dozen of defenses, of the second dozen, and so on."""


@dataclass(frozen=True)
class Look:
    """Colour, line and marker of a defense."""

    colour: str
    place: int = 0
    """Index of the colour in the palette."""
    again: int = 0
    """How many defenses before this one have the same colour."""

    @property
    def line(self) -> str:
        """The line style of matplotlib."""
        return LINES[self.again % len(LINES)]

    @property
    def mark(self) -> str:
        """The marker of matplotlib."""
        return MARKS[self.again % len(MARKS)]


def looks(defenses: Iterable[str], colours: Sequence[str] = COLOURS) -> dict[str, Look]:
    """Return a look for each defense, all different for up to four times as many as there are colours.

    The look does not depend on the order of the defenses; the result is in their order.
    """
    given = list(dict.fromkeys(defenses))
    used = dict.fromkeys(range(len(colours)), 0)
    found: dict[str, Look] = {}
    for name in sorted(given, key=lambda name: (name not in FIXED, name)):
        preferred = _preferred(name, len(colours))
        place = min(preferred, key=lambda index: (used[index], preferred.index(index)))
        found[name] = Look(colours[place], place, used[place])
        used[place] += 1
    return {name: found[name] for name in given}


def _preferred(name: str, count: int) -> list[int]:
    """Return the indices of the colours, the preferred one first; black is left to the undefended model."""
    if name in FIXED:
        first = FIXED.index(name) % count
        return [first, *(index for index in range(count) if index != first)]
    digest = {index: hashlib.sha256(f"{name}\0{index}".encode()).digest() for index in range(count)}
    return [*sorted(range(1, count), key=digest.__getitem__), 0]
