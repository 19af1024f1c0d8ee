"""Readable tables from lines: the leaderboard, its worst case, how soon attacks recover, and concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harness.contracts.table import Section
from harness.core.counted import counted
from harness.results import console as terminal
from harness.results.headline import above_notes, rank_text

SHOWN = (
    ("defense", "defense"),
    ("attack", "attack"),
    ("attacker", "attacker"),
    ("step", "step"),
    ("target_before", "before"),
    ("target_none", "undefended"),
    ("target_defended", "defended"),
    ("sgr", "SGR %"),
    ("interval", "95 %"),
    ("rank", "rank"),
    ("innocent_sgr", "innocent SGR %"),
    ("relative_gap", "RSGR (our reading) %"),
    ("recovery", "recovery"),
    ("relapse", "comes back by itself"),
    ("utility", "utility"),
    ("nearest_training", "nearest training image"),
    ("valid", "valid"),
)
TEXT = frozenset({"defense", "attack", "attacker"})
"""Text columns."""
SHARES = frozenset({"recovery", "relapse", "utility"})
"""Columns with two digits."""
WORST_LEGEND = (
    "For each defense and step the attack that comes closest to the targets, of those that count. 95 %: covers chance "
    "in seeds and prompts, and the choice of the attacks. undefended: what the closest attack on the undefended model "
    "reaches, whichever that is. An adaptive attacker's line holds the number of probes that the attack was tuned "
    "with, on each released model by itself unless its entry says tuned_on."
)
SOON_LEGEND = (
    "Steps until the attack is half way from the undefended model before it to real images; in brackets how far it is "
    "on that way on average, over the logarithm of the step: small is strong protection. Means over targets and seeds."
)
LEGEND = (
    "SGR: (undefended - defended) / undefended similarity on the targets, mean over targets and seeds; greater is "
    "stronger protection. innocent SGR: the same on innocent concepts; near 0 is good. RSGR (our reading): their "
    "difference; the papers' own formula was not found, so it is not to be set beside theirs. "
    "recovery: the defended attack's gain over the undefended one's. comes back by itself: which share of what the "
    "release took from a target returns after an adaptation that never saw it (on innocents with observe: targets, on "
    "general images, or on nothing). utility: the released model's score before any "
    "attack over the undefended model's, both above what images of another concept score. 95 %: Student t over seeds; "
    "covers chance in defense, attack and sampling for these concepts and prompts. rank: of the defenses that count, "
    "by paired tests of all pairs, corrected together (Holm); tie 1–3: chance explains the order, any rank from 1 to 3 "
    "is possible. One seed has neither interval nor rank. Every column: "
    "python -m harness.results.definitions."
)
CONCEPTS_LEGEND = (
    "SGR of each concept, with its 95 % interval by Student's t over seeds; one seed has none. An interval that holds "
    "0 is a tie with the undefended model. Whether a line counts, and the ranks of defenses, are in leaderboard.md; "
    "scores and recovery in concepts.csv."
)
NO_ROWS = Section(text=("No rows yet.",))


def sections(
    lines: Sequence[dict[str, Any]],
    worst: Sequence[dict[str, Any]] = (),
    soon: Sequence[dict[str, Any]] = (),
    short: Section | None = None,
    by_floor: Sequence[Section] = (),
) -> list[Section]:
    """Return leaderboard.md: in short; a table for each task and metric; the worst case, and how soon attacks recover.

    `short`: the section of `harness.results.headline`; `by_floor`: those of `harness.results.floors`.
    """
    if not lines:
        return [NO_ROWS]
    found = [short] if short else []
    found += _by_metric(lines)
    if worst:
        found += [Section("Worst case over attacks", (WORST_LEGEND,)), *_by_metric(worst, with_notes=False)]
    found += by_floor
    if soon:
        found += [Section("How soon", (SOON_LEGEND,)), *_soon(soon)]
    return [*found, Section(text=(LEGEND,))]


def shown(
    lines: Sequence[dict[str, Any]], worst: Sequence[dict[str, Any]] = (), short: Section | None = None
) -> list[Section]:
    """Return the sections for the terminal: the leaderboard, the worst case if there is one, and last what is short."""
    if not lines:
        return [NO_ROWS]
    found = _by_metric(lines, before_reason="not valid: ")
    if worst:
        heading, legend = Section("Worst case over attacks"), Section(text=(WORST_LEGEND,))
        found += [heading, *_by_metric(worst, with_notes=False), legend]
    for column in ("nearest_training", "relapse"):
        if all(line[column] is None for line in lines):  # not measured: space for the intervals
            found = [_without(section, dict(SHOWN)[column]) for section in found]
    return [*found, Section(text=(LEGEND,)), *([short] if short else [])]


def _by_metric(lines: Sequence[dict[str, Any]], with_notes: bool = True, before_reason: str = "") -> list[Section]:
    """Return a table for each task, metric and unit, in the order of the lines; notes: reasons, and what is unusual."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        grouped.setdefault((line["task"], line["metric"], line["unit"]), []).append(line)
    return [
        Section(
            title=_title(*name, group),
            headers=tuple(header for _, header in SHOWN),
            rows=[cells(line) for line in group],
            alignments="".join("l" if column in TEXT else "r" for column, _ in SHOWN),
            notes=(*(before_reason + note for note in _notes(group)), *above_notes(group)) if with_notes else (),
            level=3,
            faint=frozenset(place for place, line in enumerate(group) if not line["valid"]),
            ends=terminal.ends_of_groups([line["step"] for line in group]),
        )
        for name, group in grouped.items()
    ]


def _without(section: Section, header: str) -> Section:
    """Return a section without a column."""
    if header not in section.headers:
        return section
    place = section.headers.index(header)
    rows = [[*row[:place], *row[place + 1 :]] for row in section.rows]
    headers, letters = section.headers, section.alignments
    return replace(
        section,
        headers=(*headers[:place], *headers[place + 1 :]),
        rows=rows,
        alignments=letters[:place] + letters[place + 1 :],
    )


def _title(task: str, metric: str, unit: str, lines: Sequence[dict[str, Any]]) -> str:
    first = lines[0]
    return (
        f"{task} / {metric} ({unit}; {first['backbone']}): {counted(first['n_targets'], 'target')}, "
        f"{counted(first['n_innocents'], 'innocent')}, {counted(first['n_seeds'], 'seed')}"
    )


def cells(line: dict[str, Any]) -> list[str]:
    """Return the displayed cells of a line as text."""
    texts = []
    for column, _ in SHOWN:
        if column == "interval":
            low, high = line["sgr_low"], line["sgr_high"]
            is_known = low is not None and line["method"] != "none"
            texts.append(f"{100 * low:.0f} to {100 * high:.0f}" if is_known else "–")
        elif column == "rank":
            texts.append(rank_text(line))
        elif column in ("sgr", "innocent_sgr", "relative_gap"):
            texts.append("–" if line[column] is None else f"{100 * line[column]:+.1f}")
        elif column == "defense":
            texts.append(line["defense"] + (" (weak)" if line["is_weak"] else ""))
        elif column == "attacker":
            texts.append(line["attacker"] + (f", {line['n_probes']} probes" if line["n_probes"] else ""))
        elif column in ("valid",):
            texts.append("yes" if line[column] else "no")
        elif isinstance(line[column], float):
            texts.append(f"{line[column]:.{2 if column in SHARES else 3}f}")
        else:
            texts.append("–" if line[column] is None else str(line[column]))
    return texts


def _notes(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return each reason once, with the steps and defenses that it applies to."""
    notes: dict[str, list[str]] = {}
    for line in lines:
        for reason in filter(None, line["reason"].split("; ")):
            where = f"{line['defense']} at step {line['step']}"
            notes.setdefault(reason, []).append(where)
    return [f"{reason} ({', '.join(where)})" for reason, where in notes.items()]


def _soon(soon: Sequence[dict[str, Any]]) -> list[Section]:
    """Return a table for each task and metric, attacks by defenses: steps to half of the way, and area."""
    found = []
    for task, metric in dict.fromkeys((line["task"], line["metric"]) for line in soon):
        group = [line for line in soon if (line["task"], line["metric"]) == (task, metric)]
        defenses = list(dict.fromkeys(line["defense"] for line in group))
        rows = []
        for attack in dict.fromkeys(line["attack"] for line in group):
            own = {line["defense"]: line for line in group if line["attack"] == attack}
            rows.append([attack, *(soon_text(own.get(defense)) for defense in defenses)])
        found.append(Section(f"{task} / {metric}", headers=("attack", *defenses), rows=rows, level=3))
    return found


def soon_text(line: dict[str, Any] | None) -> str:
    """Return the steps to half of the way, with the area in brackets; a dash if there is no line."""
    if line is None:
        return "–"
    steps = f"> {line['last_step']}" if line["steps_to_half"] is None else f"{line['steps_to_half']:.0f}"
    return f"{steps} ({line['area']:.2f})"


def concept_sections(lines: Sequence[dict[str, Any]]) -> list[Section]:
    """Return concepts.md, SGR by concept: for each task, set, attack and metric, a row per step and defense."""
    grouped: dict[tuple, list[dict[str, Any]]] = {}
    for line in lines:
        name = (line["task"], line["protected"], line["attack"], line["attacker"], line["metric"])
        grouped.setdefault(name, []).append(line)
    found = []
    for (task, protected, attack, attacker, metric), group in grouped.items():
        concepts = list(dict.fromkeys((line["role"], line["concept"]) for line in group))
        entries: dict[tuple, dict[tuple, dict[str, Any]]] = {}
        for line in group:
            entries.setdefault((line["step"], line["defense"]), {})[line["role"], line["concept"]] = line
        rows = [
            [str(step), defense, *(_sgr_text(own[name]) if name in own else "–" for name in concepts)]
            for (step, defense), own in entries.items()
        ]
        title = f"{task}, {protected} protected: SGR % by {metric}, {attack} ({attacker})"
        headers = ("step", "defense", *(f"{role} {concept}" for role, concept in concepts))
        found.append(Section(title, headers=headers, rows=rows, alignments="rl" + "r" * len(concepts), level=3))
    return [*found, Section(text=(CONCEPTS_LEGEND,))] if found else [NO_ROWS]


def _sgr_text(line: dict[str, Any]) -> str:
    if line["sgr"] is None:
        return "–"
    low, high = line["sgr_low"], line["sgr_high"]
    around = "" if low is None or line["method"] == "none" else f" ({100 * low:.0f} to {100 * high:.0f})"
    return f"{100 * line['sgr']:+.0f}{around}"
