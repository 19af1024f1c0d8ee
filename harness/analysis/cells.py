"""Values of rows by prompt and seed, for groups of any labels. Pure; numpy and pandas are imported by callers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.analysis import statistics

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Cell:
    """The values of one group of rows: a line for each seed, a column for each prompt."""

    values: np.ndarray  # [seeds, prompts]
    seeds: tuple[int, ...]
    first: Mapping[str, Any]  # its first row
    keys: tuple[tuple[str, str], ...]  # (sample key, score key) of each seed

    @property
    def estimate(self) -> statistics.Estimate:
        """The mean, with the chance of seeds and prompts."""
        return statistics.estimate([self.values.T[None]], lambda means: means.mean(axis=(1, 2, 3)))


def cells(rows: DataFrame, names: list[str]) -> dict[tuple, Cell]:
    """Return combination of labels -> its values, for whole seeds: those with as many prompts as any other."""
    found = {}
    for label, own in rows.groupby(names, sort=False, observed=True):
        by_seed = {}
        for seed, part in own.groupby("seed", sort=True):
            ordered = part.sort_values("prompt_index", kind="stable")
            first = ordered.iloc[0]
            by_seed[int(seed)] = ordered["value"].to_numpy(), (str(first["sample_key"]), str(first["score_key"]))
        longest = max(len(values) for values, _ in by_seed.values())
        kept = {seed: each for seed, each in by_seed.items() if len(each[0]) == longest}
        found[label] = Cell(
            np.stack([values for values, _ in kept.values()]), tuple(kept), own.iloc[0].to_dict(),
            tuple(keys for _, keys in kept.values()),
        )  # fmt: skip
    return found


def common(first: Cell, second: Cell) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the values of two cells at the seeds that both have."""
    both = [seed for seed in first.seeds if seed in second.seeds]
    return (
        first.values[[first.seeds.index(seed) for seed in both]],
        second.values[[second.seeds.index(seed) for seed in both]],
        len(both),
    )
