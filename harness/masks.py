"""Masks of frozen tensors: what a defense that freezes keeps of each tensor, and how masks compare. No torch here.

Beside its protection such a defense leaves `mask.csv`, a row for each tensor of the UNet: its name, elements, whether
it is frozen, and whatever the method says of it. From those of a run `table` makes `masks.csv`, a row for each mask:

    frozen_tensors, frozen_parameters   shares of the UNet's tensors and of their elements
    correlation_with_start              of frozen (1 or 0) with the logits that learning began with
    overlap_of_seeds                    mean over pairs of seeds of the Jaccard index |A and B| / |A or B|
    overlap_by_chance                   what it would be for random sets as large: a b / N of them are in both
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.protection import Protection

FILE = "mask.csv"
KINDS = ("attention", "feed-forward", "convolution", "norm", "time embedding", "projection")
"""Of tensors, as `kind` tells them."""


def write(folder: Path, elements: Mapping[str, int], protection: Protection) -> None:
    """Write mask.csv: a row for each tensor of the UNet, in the model's order."""
    columns = list(dict.fromkeys(column for values in protection.details.values() for column in values))
    with open(folder / FILE, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["tensor", "elements", "frozen", *columns])
        for name, count in elements.items():
            if not name.startswith("unet."):
                continue
            told = protection.details.get(name, {})
            values = [repr(float(told[column])) if column in told else "" for column in columns]
            rows.writerow([name, count, int(name in protection.frozen), *values])


def read(folder: Path) -> list[dict[str, str]] | None:
    """Return the rows of mask.csv; None where the defense froze nothing and said nothing."""
    path = folder / FILE
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def frozen(rows: Sequence[Mapping[str, str]]) -> frozenset[str]:
    """Return the names of the frozen tensors."""
    return frozenset(row["tensor"] for row in rows if row["frozen"] == "1")


def overlap(first: frozenset[str], second: frozenset[str]) -> float | None:
    """Return the Jaccard index of two sets; None where both are empty."""
    either = first | second
    return len(first & second) / len(either) if either else None


def overlap_by_chance(first: int, second: int, total: int) -> float | None:
    """Return the Jaccard index of the expected intersection of random sets of so many of `total` tensors."""
    both = first * second / total
    either = first + second - both
    return both / either if either else None


def mean_overlap(sets: Sequence[frozenset[str]]) -> float | None:
    """Return the mean Jaccard index over pairs of sets; None where no pair has any."""
    found = [overlap(a, b) for a, b in itertools.combinations(sets, 2)]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def block(name: str) -> str:
    """Return where in the UNet a tensor lies: "down 0", "mid", "up 2", "in", "out" or "time"."""
    parts = name.removeprefix("unet.").split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        return f"{parts[0].removesuffix('_blocks')} {parts[1]}"
    if parts[0] == "mid_block":
        return "mid"
    return "time" if parts[0].startswith("time") else "in" if parts[0] == "conv_in" else "out"


def kind(name: str) -> str:
    """Return what a tensor of a Stable Diffusion UNet is for, one of `KINDS`."""
    for pattern, found in _KINDS:
        if pattern.search(name):
            return found
    return "projection"


_KINDS = (
    (re.compile(r"time_emb"), "time embedding"),
    (re.compile(r"\.attn[12]\."), "attention"),
    (re.compile(r"\.ff\."), "feed-forward"),
    (re.compile(r"norm"), "norm"),
    (re.compile(r"conv"), "convolution"),
)
"""The first that is found in the name; what is left are `proj_in` and `proj_out` of the attention blocks."""
