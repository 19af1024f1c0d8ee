"""Is a mask better than a random mask of the same size? Paired tests of freezing defenses against `random_freeze`.

    family   defenses that differ only in their ratio, named by the common beginning of their names
    paired   with the random_freeze defense of the same task whose share of frozen tensors is nearest, if the sizes are
             similar (`masks.as_large`)
    lines    one per ratio, and one for the mean over all measured ratios of the family, paired by concept, prompt and
             seed. Within a task, metric, attack and step, p is corrected by Holm: for single ratios over the ratios of
             all families, for means over families

There are no lines for a defense that froze nothing, or for an attack that a mask does not affect (it ignores the mask,
or trains additional weights, so its images come from the same stages for both defenses). No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from defenses.freezing.masks import Mask, as_large
from harness.contracts.table import Section

if TYPE_CHECKING:
    from harness.analysis.compare import Compared
    from harness.analysis.measurements import Measurements
    from harness.analysis.pairing import Key

OWN_COLUMNS = ("family", "is_together", "frozen", "frozen_random", "parameters", "parameters_random")
"""Columns of masks_against_random.csv before those of a comparison."""
LEGEND = (
    "stronger by: how much less the attack reaches than on random masks as large, mean over targets; above 0 the mask "
    "protects more. As large is meant of tensors; parameters % says how far the two differ in elements. 95 %: covers "
    "chance in seeds and prompts, for these concepts. p corrected: Holm, within a task, metric, attack and step: over "
    "families for all ratios together, over all ratios of all families else. unclear: not told apart; in brackets the "
    "least difference that would have been seen in four of five runs. Attackers who feel nothing of a mask have no "
    "line."
)
_OVERLAPS = (
    ("frozen_tensors", "tensors %", 100, 1),
    ("frozen_parameters", "parameters %", 100, 1),
    ("overlap_without_data", "overlap with the mask that no data gives", 1, 2),
    ("correlation_with_signal", "correlation with signal", 1, 2),
    ("overlap_of_seeds", "overlap of seeds", 1, 3),
    ("overlap_by_chance", "by chance", 1, 3),
    ("overlap_p", "p", 1, 4),
    ("overlap_with_random", "with random masks", 1, 3),
)
_HEADERS = (
    "masks", "frozen %", "random %", "parameters %", "random %", "attack", "step", "random reaches", "mask reaches",
    "stronger by", "95 %", "p", "p corrected", "innocents better by", "verdict",
)  # fmt: skip


def columns() -> tuple[str, ...]:
    """Return the columns of masks_against_random.csv."""
    from harness.analysis.compare import TEST_COLUMNS

    return (*OWN_COLUMNS, *TEST_COLUMNS)


@dataclass(frozen=True)
class Pair:
    """A defense and its random counterpart: names, and means over seeds and protected sets."""

    defense: str
    random: str
    shares: tuple[float, float]  # frozen share of tensors, for each of the two
    parameters: tuple[float, float]  # frozen share of elements


@dataclass(frozen=True)
class Family:
    """Defenses that differ only in their ratio, sorted by share."""

    task: str
    name: str
    pairs: tuple[Pair, ...]


def families(masks: Sequence[Mask]) -> list[Family]:
    """Return the families that have random masks of similar size, in the order of the masks."""
    by_defense: dict[tuple[str, str], list[Mask]] = {}
    for mask in masks:
        by_defense.setdefault((mask.task, mask.defense), []).append(mask)
    grouped: dict[tuple[str, frozenset[str]], list[str]] = {}
    for (task, defense), own in by_defense.items():
        if own[0].method != "random_freeze":
            grouped.setdefault((task, frozenset(mask.settings for mask in own)), []).append(defense)
    share = {name: _mean(mask.share for mask in own) for name, own in by_defense.items()}
    elements = {name: _mean(mask.share_of_parameters for mask in own) for name, own in by_defense.items()}
    random = [name for name, own in by_defense.items() if own[0].method == "random_freeze"]
    found: list[Family] = []
    for (task, _), defenses in grouped.items():
        pairs: list[Pair] = []
        for name in ((task, defense) for defense in defenses):
            own, total = share[name], len(by_defense[name][0].elements)
            fitting = [other for other in random if other[0] == task and as_large(own, share[other], total)]
            if own and fitting:
                near = min(fitting, key=lambda other: abs(share[other] - own))
                pairs.append(Pair(name[1], near[1], (own, share[near]), (elements[name], elements[near])))
        if pairs:
            taken = {family.name for family in found if family.task == task}
            taken |= {name for of, name in by_defense if of == task and name not in defenses}
            ordered = sorted(pairs, key=lambda pair: pair.shares[0])
            found.append(Family(task, _name(defenses, taken), tuple(ordered)))
    return found


def _name(defenses: Sequence[str], taken: Collection[str]) -> str:
    """Return the common beginning of the names; the first name if that is empty or already taken."""
    shared = os.path.commonprefix(list(defenses)).rstrip("0123456789_-.+")
    return shared if len(defenses) > 1 and shared and shared not in taken else defenses[0]


def lines(masks: Sequence[Mask], table: Measurements, draws: int = 1000) -> list[dict[str, Any]]:
    """Return the lines of masks_against_random.csv: for each family its ratios, then all ratios together."""
    from harness.analysis.compare import judge

    known = families(masks)
    found = []
    for key in table.groups:
        singles, together = [], []
        for family in known:
            if family.task != key[0]:
                continue
            measured = [(pair, one) for pair in family.pairs if (one := _compared(table, key, family, [pair], draws))]
            singles += [one for _, one in measured]
            all_of_it = _compared(table, key, family, [pair for pair, _ in measured], draws) if measured else None
            together += [all_of_it] if all_of_it else []
        for compared, is_together in ((singles, False), (together, True)):
            found += [{**line, "is_together": is_together} for line in judge(compared)]
    groups = list(dict.fromkeys((task, metric) for task, _, _, metric, _ in table.groups))
    names = [(family.task, family.name) for family in known]
    return sorted(
        found,
        key=lambda line: (groups.index((line["task"], line["metric"])), names.index((line["task"], line["family"]))),
    )


def _compared(
    table: Measurements, key: Key, family: Family, pairs: Sequence[Pair], draws: int
) -> Compared | None:
    """Return the comparison of means over pairs; None if not measured, or if the mask does not affect the attack."""
    from harness.analysis.compare import compare_sides

    sides = [pair.defense for pair in pairs], [pair.random for pair in pairs]
    if all(table.shares_images(*key[:3], pair.defense, pair.random) for pair in pairs):
        return None
    compared = compare_sides(table, [key], sides, draws)
    if compared is None:
        return None
    line, found = compared
    about = {
        "family": family.name,
        "is_together": None,
        "frozen": _mean(pair.shares[0] for pair in pairs),
        "frozen_random": _mean(pair.shares[1] for pair in pairs),
        "parameters": _mean(pair.parameters[0] for pair in pairs),
        "parameters_random": _mean(pair.parameters[1] for pair in pairs),
    }
    return about | line, found


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def sections(overlaps: Sequence[dict[str, Any]], against: Sequence[dict[str, Any]]) -> list[Section]:
    """Return masks.md: how the masks of each defense agree, then the lines, those of all ratios together first."""
    found = [Section("Masks of frozen tensors", level=1), _agreement(overlaps)]
    for is_together, title in ((True, "All ratios together"), (False, "Each ratio")):
        own = [line for line in against if line["is_together"] == is_together]
        for task, metric in dict.fromkeys((line["task"], line["metric"]) for line in own):
            group = [line for line in own if (line["task"], line["metric"]) == (task, metric)]
            found.append(
                Section(
                    f"{title} against random masks: {task}, {metric} ({group[0]['unit']})",
                    headers=_HEADERS,
                    rows=[[line["family"] if is_together else line["defense"], *_texts(line)] for line in group],
                    alignments="l" + "r" * 4 + "l" + "r" * 8 + "l",
                )
            )
    return [*found, Section(text=(LEGEND,))] if against else found


def _agreement(overlaps: Sequence[dict[str, Any]]) -> Section:
    """Return the table of the agreement between masks of one defense: a row for each protected set."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in overlaps:
        grouped.setdefault((line["task"], line["defense"], line["protected"]), []).append(line)
    rows = [
        [*name, str(len(own)), *(_mean_text([line[c] for line in own], factor, n) for c, _, factor, n in _OVERLAPS)]
        for name, own in grouped.items()
    ]
    return Section(
        "Do masks agree?",
        text=(
            "Means over seeds. Overlap is |A and B| / |A or B|; p: the chance that random sets as large overlap as "
            "much, not corrected. The mask that no data gives: learned from the same start with a signal of zero.",
        ),
        headers=("task", "defense", "protected", "masks", *(header for _, header, _, _ in _OVERLAPS)),
        rows=rows,
        alignments="lll" + "r" * (len(_OVERLAPS) + 1),
    )


def _texts(line: dict[str, Any]) -> list[str]:
    from harness.results.comparison import SHOWN_OF_TEST, cells

    attack, step, _, random, own, *rest = cells(line, SHOWN_OF_TEST)
    shares = [f"{100 * line[name]:.1f}" for name in ("frozen", "frozen_random", "parameters", "parameters_random")]
    return [*shares, attack, step, random, own, *rest]


def _mean_text(values: Sequence[float | None], factor: float, digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{factor * sum(known) / len(known):.{digits}f}" if known else "–"
