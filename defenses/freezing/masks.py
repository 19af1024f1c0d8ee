"""Masks of frozen tensors: the record that a freezing defense keeps of each tensor, and comparisons of masks.

A freezing defense writes `mask.csv` next to its protection, with a row for each tensor of the UNet: name, elements,
whether it is frozen, and details from the method. From the masks of a run, `masks.csv` is made, with a row for each
mask (`COLUMNS`). Overlap is the Jaccard index of two masks, |A and B| / |A or B|; overlap by chance is its expectation
for random sets of the same sizes. Whether masks of several seeds overlap more is tested against randomly drawn masks.
`Freezing.mask_without_data` of the method (with torch) gives the mask that would be learned without data.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.identity import digest_of_json

if TYPE_CHECKING:
    import numpy as np

    from harness.contracts.protection import Protection

FILE = "mask.csv"
OF_LEDGER = ("correlation_with_start", "correlation_with_signal", "moved_by_signal", "moved_by_sparsity")
"""Numbers from the ledger of a learned mask's stage."""
COLUMNS = (
    "task", "defense", "method", "profile", "protected", "seed", "tensors", "frozen_tensors", "frozen_parameters",
    *OF_LEDGER, "overlap_without_data", "overlap_of_seeds", "overlap_by_chance", "overlap_p", "overlap_with_random",
    "random_overlap_of_seeds",
)  # fmt: skip
"""Columns of masks.csv, defined in `defenses.freezing.definitions`."""
KINDS = ("attention", "feed-forward", "convolution", "norm", "time embedding", "projection")
"""Kinds of tensors, as returned by `kind`."""


def write(folder: Path, elements: Mapping[str, int], protection: Protection) -> None:
    """Write mask.csv: a row for each tensor of the UNet, in the model's order."""
    columns = list(dict.fromkeys(column for values in protection.details.values() for column in values))
    with open(folder / FILE, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["tensor", "elements", "frozen", *columns])
        for name, count in elements.items():
            if not name.startswith("unet."):
                continue
            details = protection.details.get(name, {})
            values = [repr(float(details[column])) if column in details else "" for column in columns]
            rows.writerow([name, count, int(name in protection.frozen), *values])


def read(folder: Path) -> list[dict[str, str]] | None:
    """Return the rows of mask.csv; None if the defense froze nothing and reported no details."""
    path = folder / FILE
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def frozen(rows: Sequence[Mapping[str, str]]) -> frozenset[str]:
    """Return the names of the frozen tensors."""
    return frozenset(row["tensor"] for row in rows if row["frozen"] == "1")


def overlap(first: frozenset[str], second: frozenset[str]) -> float | None:
    """Return the Jaccard index of two sets; None if both are empty."""
    either = first | second
    return len(first & second) / len(either) if either else None


@lru_cache(maxsize=1000)
def overlap_by_chance(first: int, second: int, total: int) -> float | None:
    """Return the expected Jaccard index of random sets of these sizes from `total` tensors; None if both are empty."""
    if not first and not second:
        return None
    pairs = comb(total, second)
    shared = range(max(0, first + second - total), min(first, second) + 1)
    return sum(
        comb(first, both) * comb(total - first, second - both) / pairs * both / (first + second - both)
        for both in shared
    )


def overlap_p(masks: Sequence[Mask], draws: int = 1999) -> float | None:
    """Return the probability that random sets of the same sizes overlap at least as much as these masks (pair mean).

    One-sided, estimated by `draws` random draws (Phipson and Smyth 2010: never 0). Pairs of empty masks do not count.
    None without a pair that could overlap.
    """
    import numpy as np

    sets = [mask.frozen for mask in masks]
    pairs = [(i, j) for i, j in combinations(range(len(sets)), 2) if sets[i] or sets[j]]
    if not any(sets[i] and sets[j] for i, j in pairs):
        return None
    total = len(masks[0].elements)
    source = np.random.default_rng(0)

    def mean_overlap(members: np.ndarray) -> np.ndarray:
        """[draws, sets, tensors] -> [draws]."""
        both = [(members[:, i] & members[:, j]).sum(-1) / (members[:, i] | members[:, j]).sum(-1) for i, j in pairs]
        return np.mean(both, axis=0)

    drawn = np.stack([source.random((draws, total)).argsort(axis=1) < len(each) for each in sets], axis=1)
    own = np.array([[[name in each for name in masks[0].elements] for each in sets]])
    as_much = mean_overlap(drawn) >= mean_overlap(own) - 1e-12
    return float(1 + as_much.sum()) / (1 + draws)


def as_large(first: float, second: float, total: int) -> bool:
    """Return whether two shares of `total` tensors count as equal: a quarter or one tensor apart, at most 5 points."""
    return second > 0 and abs(first - second) <= min(0.05, max(0.25 * first, 1 / total)) + 1e-12


@dataclass(frozen=True)
class Mask:
    """One mask of a run."""

    task: str
    defense: str
    method: str
    profile: str
    protected: tuple[str, ...]
    seed: int
    elements: Mapping[str, int]  # of every tensor of the UNet
    frozen: frozenset[str]
    numbers: Mapping[str, float]  # of the stage's ledger
    without_data: frozenset[str] | None = None  # mask learned from its start without data; None: not learned
    parameters: Mapping[str, Any] = field(default_factory=dict)  # the method's
    given: str = "all"  # which concepts of the set it protects, and whether it is weak on purpose
    stage: str | None = None  # key of the defense's stage; masks that do not depend on the seed share one

    @property
    def share(self) -> float:
        """The share of frozen tensors."""
        return len(self.frozen) / len(self.elements)

    @property
    def share_of_parameters(self) -> float:
        """The share of frozen elements."""
        return sum(self.elements[name] for name in self.frozen) / sum(self.elements.values())

    @property
    def ratio(self) -> float | None:
        """The requested ratio; None: the method has none."""
        return self.parameters.get("ratio")

    @property
    def settings(self) -> str:
        """The settings shared by masks of one family: all but the ratio."""
        own = {name: value for name, value in self.parameters.items() if name != "ratio"}
        return digest_of_json([self.method, own, self.given])

    def is_same(self, other: Mask) -> bool:
        """Return whether both are the same mask: of the same seed, or of the same stage, independent of the seed."""
        return self.seed == other.seed or (self.stage is not None and self.stage == other.stage)

    @property
    def group(self) -> tuple:
        """The labels shared by this mask and those of other seeds."""
        return self.task, self.defense, self.protected


def table(masks: Sequence[Mask]) -> list[dict[str, Any]]:
    """Return the rows of masks.csv."""
    groups: dict[tuple, list[Mask]] = {}
    for mask in masks:
        groups.setdefault(mask.group, []).append(mask)
    tests = {group: overlap_p(_distinct(own)) for group, own in groups.items()}
    lines = []
    for mask in masks:
        others = [other for other in groups[mask.group] if not mask.is_same(other)]
        random = [
            m
            for m in masks
            if m.method == "random_freeze" and m.task == mask.task and as_large(mask.share, m.share, len(mask.elements))
        ]
        # random masks of one seed are nested, and the same for every protected set
        unrelated = [m for m in random if mask.method != "random_freeze" or m.seed != mask.seed]
        total, count = len(mask.elements), len(mask.frozen)
        lines.append(
            {
                "task": mask.task,
                "defense": mask.defense,
                "method": mask.method,
                "profile": mask.profile,
                "protected": "+".join(mask.protected),
                "seed": mask.seed,
                "tensors": total,
                "frozen_tensors": mask.share,
                "frozen_parameters": mask.share_of_parameters,
                **{name: mask.numbers.get(name) for name in OF_LEDGER},
                "overlap_without_data": None if mask.without_data is None else overlap(mask.frozen, mask.without_data),
                "overlap_of_seeds": _mean(overlap(mask.frozen, other.frozen) for other in others),
                "overlap_by_chance": _mean(overlap_by_chance(count, len(m.frozen), total) for m in others),
                "overlap_p": tests[mask.group],
                "overlap_with_random": _mean(overlap(mask.frozen, m.frozen) for m in unrelated),
                "random_overlap_of_seeds": _mean(
                    overlap(a.frozen, b.frozen) for i, a in enumerate(random) for b in random[:i] if a.seed != b.seed
                ),
            }
        )
    return lines


def _distinct(masks: Sequence[Mask]) -> list[Mask]:
    found: list[Mask] = []
    for mask in masks:
        if not any(mask.is_same(other) for other in found):
            found.append(mask)
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def block(name: str) -> str:
    """Return the part of the UNet that a tensor is in: "down 0", "mid", "up 2", "in", "out" or "time"."""
    parts = name.removeprefix("unet.").split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        return f"{parts[0].removesuffix('_blocks')} {parts[1]}"
    if parts[0] == "mid_block":
        return "mid"
    return "time" if parts[0].startswith("time") else "in" if parts[0] == "conv_in" else "out"


def kind(name: str) -> str:
    """Return the kind of a tensor of a Stable Diffusion UNet, one of `KINDS`."""
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
"""The first match in the name decides; the rest are `proj_in` and `proj_out` of the attention blocks."""
