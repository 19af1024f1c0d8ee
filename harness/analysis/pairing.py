"""Measurements of several defenses, paired by concept, prompt and seed. Pure arithmetic, no torch, no files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.analysis.measurements import Cell, Measurements

Key = tuple[str, str, str, str, int]
"""(task, attack, attacker, metric, step)."""


def paired_cells(
    table: Measurements, keys: Sequence[Key], sides: Sequence[Sequence[str]], role: str
) -> tuple[list[np.ndarray], int]:
    """Return (one array [sides x attacks, prompts, seeds] per concept, number of seeds); sides follow one another.

    Only concepts and seeds that were measured in every attack, on all sides, with the same number of prompts. For an
    unfinished run, the seeds are those that keep most of it. Several defenses of a side are averaged.
    """
    found = [
        table.values(task, defense, attack, attacker, metric, step, role)
        for side in sides
        for defense in side
        for task, attack, attacker, metric, step in keys
    ]
    ends = np.cumsum([len(side) for side in sides])[:-1]
    if not all(found):
        return [], 0
    shared = set.intersection(*(set(values) for values in found))
    by_cell: dict[Cell, set[int]] = {}
    for protected, concept, seed in shared:
        by_cell.setdefault((protected, concept), set()).add(seed)
    order = [cell for cell in dict.fromkeys(trial[:2] for trial in found[0]) if cell in by_cell]
    if not order:
        return [], 0
    seeds = _seeds_kept(list(by_cell.values()))
    arrays = []
    for cell in order:
        listed = [[values[(*cell, seed)] for seed in seeds] for values in found if set(seeds) <= by_cell[cell]]
        lengths = {len(values) for of in listed for values in of}
        if listed and len(lengths) == 1:
            values = np.asarray(listed, dtype=float).swapaxes(1, 2)
            by_defense = values.reshape(-1, len(keys), *values.shape[1:])
            arrays.append(np.concatenate([of_side.mean(axis=0) for of_side in np.split(by_defense, ends)]))
    return arrays, len(seeds)


def _seeds_kept(by_concept: Sequence[set[int]]) -> list[int]:
    """Return the seeds that maximize seeds x concepts that have all of them; on a tie, the choice with most seeds."""
    choices: set[frozenset[int]] = set()  # every intersection of the concepts' seeds
    for own in {frozenset(own) for own in by_concept}:
        choices |= {own} | {own & other for other in choices}

    def kept(seeds: frozenset[int]) -> tuple:
        return len(seeds) * sum(seeds <= own for own in by_concept), len(seeds), sorted(seeds)

    return sorted(max(choices, key=kept))
