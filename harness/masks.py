"""Masks of frozen tensors: what a defense that freezes keeps of each tensor, and how masks compare. No torch here.

Beside its protection such a defense leaves `mask.csv`, a row for each tensor of the UNet: its name, elements, whether
it is frozen, and whatever the method says of it. From those of a run the tables get `masks.csv`, a row for each mask
(`COLUMNS`). Overlap is the Jaccard index of two masks, |A and B| / |A or B|; by chance it is what the expected
intersection a b / N of random sets of a and b tensors gives.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.plan import Plan
    from harness.protection import Protection
    from harness.store import Store

FILE = "mask.csv"
OF_LEDGER = ("correlation_with_start", "correlation_with_signal", "moved_by_signal", "moved_by_sparsity")
"""Numbers that a learned mask's stage left in its ledger."""
COLUMNS = (
    "task", "defense", "method", "profile", "protected", "seed", "tensors", "frozen_tensors", "frozen_parameters",
    *OF_LEDGER, "overlap_of_seeds", "overlap_by_chance", "overlap_with_random", "random_overlap_of_seeds",
)  # fmt: skip
"""Of masks.csv; `metrics.definitions` says what each means."""
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

    @property
    def group(self) -> tuple:
        """What masks of other seeds have in common with this one."""
        return self.task, self.defense, self.protected


def of_run(plan: Plan, store: Store) -> list[Mask]:
    """Return the masks of a plan's defenses that are committed, each once, in the plan's order."""
    found: dict[tuple, Mask] = {}
    for trial in plan.trials:
        name = (trial.task, trial.defense, trial.protected, trial.seed)
        if name in found or not trial.released or not store.has("immunize", trial.released):
            continue
        rows = read(store.path("immunize", trial.released))
        if rows is None:
            continue
        found[name] = Mask(
            trial.task,
            trial.defense,
            trial.method,
            trial.profile,
            trial.protected,
            trial.seed,
            {row["tensor"]: int(row["elements"]) for row in rows},
            frozen(rows),
            store.record("immunize", trial.released)["ledger"]["numbers"],
        )
    return list(found.values())


def table(masks: Sequence[Mask]) -> list[dict[str, Any]]:
    """Return the rows of masks.csv."""
    lines = []
    for mask in masks:
        others = [other for other in masks if other.group == mask.group and other.seed != mask.seed]
        random = [m for m in masks if m.method == "random_freeze" and _as_large(m, mask) and m.task == mask.task]
        # of one seed random masks are parts of each other, and the same for every protected set
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
                "frozen_tensors": count / total,
                "frozen_parameters": sum(mask.elements[n] for n in mask.frozen) / sum(mask.elements.values()),
                **{name: mask.numbers.get(name) for name in OF_LEDGER},
                "overlap_of_seeds": _mean(overlap(mask.frozen, other.frozen) for other in others),
                "overlap_by_chance": _mean(overlap_by_chance(count, len(m.frozen), total) for m in others),
                "overlap_with_random": _mean(overlap(mask.frozen, m.frozen) for m in unrelated),
                "random_overlap_of_seeds": _mean(
                    overlap(a.frozen, b.frozen) for i, a in enumerate(random) for b in random[:i] if a.seed != b.seed
                ),
            }
        )
    return lines


def _as_large(first: Mask, second: Mask) -> bool:
    return abs(len(first.frozen) - len(second.frozen)) <= 0.05 * len(first.elements)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
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
