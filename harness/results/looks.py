"""The look of defenses in figures: as far as possible each keeps its colour in every run.

The undefended model and the bundled methods have fixed colours; any other label has the colour that its digest gives,
or where another defense of the figure has that one, the next that is free. Where none is free, two have one colour, and
the second has another line and marker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Okabe and Ito's palette, which is safe for colour-blind readers, then seven colours of Tol's muted palette, and grey
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442",
    "#882255", "#999933", "#332288", "#44AA99", "#CC6677", "#117733", "#AA4499", "#888888",
)  # fmt: skip
FIXED = (
    "none", "imma", "uce", "mima", "freezeasguard", "random_freeze", "esd", "freeze_component", "joint", "merged",
    "concept_prune", "rece", "meta_unlearning", "resalign", "clamp_like",
)  # fmt: skip
"""Labels with a colour of COLOURS each, in its order: the bundled methods that change a model as it is."""
LINES, MARKS = ("-", "--", ":", "-."), "osD^"
"""Line and marker of the first defense of a colour, of the second, and so on."""


@dataclass(frozen=True)
class Look:
    """Colour, line and marker of a defense."""

    colour: str
    place: int = 0
    """Index of the colour in the palette."""
    again: int = 0
    """How many other defenses of the figure have the same colour and come first."""

    @property
    def line(self) -> str:
        """The line style of matplotlib."""
        return LINES[self.again % len(LINES)]

    @property
    def mark(self) -> str:
        """The marker of matplotlib."""
        return MARKS[(self.again + self.again // len(LINES)) % len(MARKS)]


def looks(defenses: Iterable[str], colours: Sequence[str] = COLOURS) -> dict[str, Look]:
    """Return a look for each defense, in their order; up to 16 defenses of one colour differ in line or marker.

    The look does not depend on the order. Bundled methods choose before other labels, those by their names.
    """
    given = list(dict.fromkeys(defenses))
    used = [0] * len(colours)
    found: dict[str, Look] = {}
    for name in sorted(given, key=lambda name: (name not in FIXED, name)):
        own = _place(name, len(colours))
        # black, the first, is left to the undefended model
        others = [1 + (own - 1 + shift) % (len(colours) - 1) for shift in range(len(colours) - 1)]
        free = [own] if name in FIXED else [place for place in others if not used[place]]
        place = free[0] if free else own
        found[name] = Look(colours[place], place, used[place])
        used[place] += 1
    return {name: found[name] for name in given}


def _place(name: str, count: int) -> int:
    """Return the index of a defense's colour; the first one, black, is left to the undefended model."""
    if name in FIXED:
        return FIXED.index(name) % count
    return 1 + int.from_bytes(hashlib.blake2b(name.encode()).digest(), "big") % (count - 1)
