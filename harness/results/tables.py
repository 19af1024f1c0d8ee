"""Tables of a run: rows.csv, leaderboard.csv and .md, concepts.csv and .md, and the text that a terminal shows.

Where a defense freezes tensors, also masks.csv, masks.md and masks.png (`defenses/freezing/masks.py`),
masks_against_random.csv and .png (`defenses/freezing/against_random.py`), adaptation_cost.csv and .md, and
freezing.csv and .md (`defenses/freezing/tables.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from defenses.freezing import against_random as masks_against_random
from defenses.freezing import against_random_figure, mask_figure, masks
from defenses.freezing import tables as freezing_tables
from harness.analysis.curves import COLUMNS as CURVE_COLUMNS
from harness.analysis.curves import curves
from harness.analysis.leaderboard import COLUMNS, CONCEPT_COLUMNS, Gates, by_concept, leaderboard, worst_case
from harness.analysis.measurements import Measurements
from harness.analysis.paper_rows import PaperRow
from harness.core.files import write_json, write_text
from harness.core.identity import digest_of_json
from harness.plan.graph import Plan
from harness.results import adaptation_cost
from harness.results.figures import recovery_curves
from harness.results.rows import COLUMNS as ROW_COLUMNS
from harness.results.rows import collect, write_csv, write_through
from harness.store import provenance
from harness.store.store import Store

STATE = "tables.json"
"""What the tables in a folder were made from."""
VERSION = 11
"""Raised when the same rows make other tables or figures."""
_AGAINST = "masks_against_random.png"
FILES = (
    "rows.csv", "leaderboard.csv", "leaderboard.md", "worst_case.csv", "curves.csv", "concepts.csv", "concepts.md",
    "recovery_target.png",
)  # fmt: skip
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
    ("innocent_sgr", "innocent SGR %"),
    ("relative_gap", "RSGR (our reading) %"),
    ("recovery", "recovery"),
    ("utility", "utility"),
    ("nearest_training", "nearest training image"),
    ("valid", "valid"),
)
TEXT = frozenset({"defense", "attack", "attacker"})
"""Columns of words."""
WORST_LEGEND = (
    "For each defense and step the attack that comes closest to the targets, of those that count; best protection "
    "first. undefended: what the closest attack on the undefended model reaches, whichever that is. An adaptive "
    "attacker's line holds the number of probes that the attack was tuned with, on each released model by itself."
)
SOON_LEGEND = (
    "Steps until the attack is half way from the undefended model before it to real images; in brackets how far it is "
    "on that way on average, over the logarithm of the step: small is strong protection. Means over targets and seeds."
)
LEGEND = (
    "SGR: (undefended - defended) / undefended similarity on the targets, mean over targets and seeds; greater is "
    "stronger protection. innocent SGR: the same on innocent concepts; near 0 is good. RSGR (our reading): their "
    "difference; the papers' own formula was not found, so it is not to be set beside theirs. "
    "recovery: the defended attack's gain over the undefended one's. utility: the released model's score before any "
    "attack over the undefended model's, both above what images of another concept score. 95 %: Student t over seeds; "
    "covers chance in defense, attack and sampling for these concepts and prompts. Every column: "
    "python -m harness.analysis.definitions."
)

CONCEPTS_LEGEND = (
    "SGR of each concept, with its 95 % interval by Student's t over seeds. Whether a line counts stands in "
    "leaderboard.md; scores and recovery in concepts.csv."
)


def write(
    plan: Plan, store: Store, folder: Path, model_name: str, gates: Gates, papers: Sequence[PaperRow] = ()
) -> list[dict[str, Any]]:
    """Write the tables of a run from what is committed; return the leaderboard's lines.

    `papers` are numbers that stand beside, in freezing.md, freezing.csv and adaptation_cost.csv.
    """
    is_whole = all(store.has(plan.stages[k].kind, k) for each in plan.measurements for k in each.scores.values())
    folder.mkdir(parents=True, exist_ok=True)
    table = Measurements(write_through(folder / "rows.csv", collect(plan, store, model_name), ROW_COLUMNS))
    lines = leaderboard(table, gates)
    write_csv(folder / "leaderboard.csv", lines, COLUMNS)
    worst = worst_case(lines)
    write_csv(folder / "worst_case.csv", worst, COLUMNS)
    soon = curves(table)
    write_csv(folder / "curves.csv", soon, CURVE_COLUMNS)
    write_text(folder / "leaderboard.md", markdown(lines, worst, soon))
    concepts = by_concept(table)
    write_csv(folder / "concepts.csv", concepts, CONCEPT_COLUMNS)
    write_text(folder / "concepts.md", concepts_markdown(concepts))
    for role in ("target", "innocent"):
        recovery_curves(table, folder / f"recovery_{role}.png", role)
    frozen = masks.of_run(plan, store)
    if frozen:
        _write_frozen(plan, store, folder, model_name, frozen, table, lines, papers)
    write_json(folder / STATE, {"of": _fingerprint(plan, model_name, gates), "is_whole": is_whole})
    return lines


def _write_frozen(
    plan: Plan,
    store: Store,
    folder: Path,
    model_name: str,
    frozen: Sequence[masks.Mask],
    table: Measurements,
    lines: Sequence[dict[str, Any]],
    papers: Sequence[PaperRow],
) -> None:
    """Write what is told of frozen tensors: masks, what they are worth, and what they save."""
    overlaps, against = masks.table(frozen), masks_against_random.lines(frozen, table)
    write_csv(folder / "masks.csv", overlaps, masks.COLUMNS)
    write_csv(folder / "masks_against_random.csv", against, masks_against_random.COLUMNS)
    write_text(folder / "masks.md", masks_against_random.markdown(overlaps, against))
    for name, is_drawn in (
        ("masks.png", mask_figure.draw(frozen, folder / "masks.png")),
        (_AGAINST, against_random_figure.draw(overlaps, against, folder / _AGAINST)),
    ):
        if not is_drawn:
            (folder / name).unlink(missing_ok=True)
    adaptations = adaptation_cost.records(plan, store)
    costs = adaptation_cost.lines(plan, adaptations)
    write_text(folder / "adaptation_cost.md", adaptation_cost.markdown(costs))
    labels = [each.labels for each in plan.measurements]
    together = {about["task"]: 0 for about in labels}
    for about in labels:
        together[about["task"]] = max(together[about["task"]], len(about["protected"]))
    erasing = {about["task"] for about in labels if about["defense"] == "original"}
    shown = freezing_tables.lines(lines, frozen, together, table)
    names = freezing_tables.paper_names(shown, frozen, erasing)
    order = list(dict.fromkeys(name for known in table.defenses.values() for name in known))
    origin = provenance.told(plan.suite, model_name, list(adaptations.values()))
    write_text(folder / "freezing.md", freezing_tables.markdown(shown, costs, order, papers, names, origin))
    columns, of_costs = freezing_tables.COLUMNS, adaptation_cost.COLUMNS
    if papers:
        columns += tuple(freezing_tables.PAPER_COLUMNS)
        of_costs += tuple(freezing_tables.PAPER_COST_COLUMNS)
        costs = freezing_tables.costs_beside_paper(costs, shown, papers, names)
        shown = freezing_tables.beside_paper(shown, papers, names)
    write_csv(folder / "freezing.csv", shown, columns)
    write_csv(folder / "adaptation_cost.csv", costs, of_costs)


def are_written(plan: Plan, folder: Path, model_name: str, gates: Gates) -> bool:
    """Tell whether the folder's tables are those of this plan and these gates, with every row."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    whole = {"of": _fingerprint(plan, model_name, gates), "is_whole": True}
    return state == whole and all((folder / name).is_file() for name in FILES)


def _fingerprint(plan: Plan, model_name: str, gates: Gates) -> str:
    """Return a digest of everything that the tables are made from, but the values: those the score keys stand for."""
    measured = [asdict(each) for each in plan.measurements]
    return digest_of_json([VERSION, plan.suite, model_name, asdict(gates), measured])


def sections(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Return the lines by (task, metric, unit), in order: a table each."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        grouped.setdefault((line["task"], line["metric"], line["unit"]), []).append(line)
    return grouped


def _title(task: str, metric: str, unit: str, lines: Sequence[dict[str, Any]]) -> str:
    first = lines[0]
    seeds = "1 seed" if first["n_seeds"] == 1 else f"{first['n_seeds']} seeds"
    return (
        f"{task} / {metric} ({unit}; {first['backbone']}): {first['n_targets']} target(s), "
        f"{first['n_innocents']} innocent(s), {seeds}"
    )


def cells(line: dict[str, Any]) -> list[str]:
    """Return the shown cells of a line as text."""
    texts = []
    for column, _ in SHOWN:
        if column == "interval":
            low, high = line["sgr_low"], line["sgr_high"]
            is_known = low is not None and line["method"] != "none"
            texts.append(f"{100 * low:.0f} to {100 * high:.0f}" if is_known else "–")
        elif column in ("sgr", "innocent_sgr", "relative_gap"):
            texts.append("–" if line[column] is None else f"{100 * line[column]:+.1f}")
        elif column == "defense":
            texts.append(line["defense"] + (" (weak)" if line["is_weak"] else ""))
        elif column == "attacker":
            texts.append(line["attacker"] + (f", {line['n_probes']} probes" if line["n_probes"] else ""))
        elif column in ("valid",):
            texts.append("yes" if line[column] else "no")
        elif isinstance(line[column], float):
            texts.append(f"{line[column]:.3f}" if column not in ("recovery", "utility") else f"{line[column]:.2f}")
        else:
            texts.append("–" if line[column] is None else str(line[column]))
    return texts


def _notes(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return each reason once, with the steps and defenses that it concerns."""
    notes: dict[str, list[str]] = {}
    for line in lines:
        for reason in filter(None, line["reason"].split("; ")):
            where = f"{line['defense']} at step {line['step']}"
            notes.setdefault(reason, []).append(where)
    return [f"{reason} ({', '.join(where)})" for reason, where in notes.items()]


def markdown(
    lines: Sequence[dict[str, Any]], worst: Sequence[dict[str, Any]] = (), soon: Sequence[dict[str, Any]] = ()
) -> str:
    """Return the leaderboard as Markdown, a table for each task and metric; then the worst case, and how soon."""
    if not lines:
        return "No rows yet.\n"
    parts = _markdown_tables(lines)
    if worst:
        parts += ["## Worst case over attacks\n", f"{WORST_LEGEND}\n", *_markdown_tables(worst, with_notes=False)]
    if soon:
        parts += ["## How soon\n", f"{SOON_LEGEND}\n", *_soon_tables(soon)]
    return "\n".join([*parts, LEGEND, ""])


def _markdown_tables(lines: Sequence[dict[str, Any]], with_notes: bool = True) -> list[str]:
    parts = []
    for (task, metric, unit), group in sections(lines).items():
        parts.append(f"### {_title(task, metric, unit, group)}\n")
        parts.append("| " + " | ".join(header for _, header in SHOWN) + " |")
        parts.append("|" + "|".join(" --- " if c in TEXT else " ---: " for c, _ in SHOWN) + "|")
        parts += ["| " + " | ".join(cells(line)) + " |" for line in group]
        parts += ["", *(f"- {note}" for note in _notes(group) if with_notes), ""]
    return parts


def _soon_tables(soon: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table for each task and metric: attacks by defenses, steps to half and area."""
    parts = []
    for task, metric in dict.fromkeys((line["task"], line["metric"]) for line in soon):
        group = [line for line in soon if (line["task"], line["metric"]) == (task, metric)]
        defenses = list(dict.fromkeys(line["defense"] for line in group))
        parts.append(f"### {task} / {metric}\n")
        parts.append("| attack | " + " | ".join(defenses) + " |")
        parts.append("| --- |" + " ---: |" * len(defenses))
        for attack in dict.fromkeys(line["attack"] for line in group):
            found = {line["defense"]: line for line in group if line["attack"] == attack}
            parts.append(f"| {attack} | " + " | ".join(soon_text(found.get(defense)) for defense in defenses) + " |")
        parts.append("")
    return parts


def soon_text(line: dict[str, Any] | None) -> str:
    if line is None:
        return "–"
    steps = f"> {line['last_step']}" if line["steps_to_half"] is None else f"{line['steps_to_half']:.0f}"
    return f"{steps} ({line['area']:.2f})"


def concepts_markdown(lines: Sequence[dict[str, Any]]) -> str:
    """Return SGR by concept as Markdown: for each task, set, attack and metric, a row a step and defense."""
    tables: dict[tuple, list[dict[str, Any]]] = {}
    for line in lines:
        tables.setdefault(
            (line["task"], line["protected"], line["attack"], line["attacker"], line["metric"]), []
        ).append(line)
    parts = []
    for (task, protected, attack, attacker, metric), group in tables.items():
        concepts = list(dict.fromkeys((line["role"], line["concept"]) for line in group))
        parts.append(f"### {task}, {protected} protected: SGR % by {metric}, {attack} ({attacker})\n")
        parts.append("| step | defense | " + " | ".join(f"{role} {concept}" for role, concept in concepts) + " |")
        parts.append("| ---: | --- |" + " ---: |" * len(concepts))
        entries: dict[tuple, dict[tuple, dict[str, Any]]] = {}
        for line in group:
            entries.setdefault((line["step"], line["defense"]), {})[line["role"], line["concept"]] = line
        for (step, defense), by_name in entries.items():
            texts = [_sgr_text(by_name[name]) if name in by_name else "–" for name in concepts]
            parts.append(f"| {step} | {defense} | " + " | ".join(texts) + " |")
        parts.append("")
    return "\n".join([*parts, CONCEPTS_LEGEND, ""]) if parts else "No rows yet.\n"


def _sgr_text(line: dict[str, Any]) -> str:
    if line["sgr"] is None:
        return "–"
    low, high = line["sgr_low"], line["sgr_high"]
    around = "" if low is None or line["method"] == "none" else f" ({100 * low:.0f} to {100 * high:.0f})"
    return f"{100 * line['sgr']:+.0f}{around}"


def show(lines: Sequence[dict[str, Any]], console) -> None:
    """Print the leaderboard to a rich console, and the worst case where there are several attacks."""
    if not lines:
        console.print("No rows yet.")
        return
    _print_tables(lines, console)
    worst = worst_case(lines)
    if worst:
        console.print("Worst case over attacks", style="bold")
        _print_tables(worst, console, with_notes=False)
        console.print(WORST_LEGEND, style="dim", highlight=False)
    console.print(LEGEND, style="dim", highlight=False)


def _print_tables(lines: Sequence[dict[str, Any]], console, with_notes: bool = True) -> None:
    from rich.table import Table

    for (task, metric, unit), group in sections(lines).items():
        table = Table(title=_title(task, metric, unit, group), title_justify="left", pad_edge=False)
        for column, header in SHOWN:
            is_text = column in TEXT
            table.add_column(header, justify="left" if is_text else "right", no_wrap=is_text)
        for line, following in zip(group, [*group[1:], None], strict=True):
            is_last_of_step = following is not None and following["step"] != line["step"]
            table.add_row(*cells(line), style=None if line["valid"] else "dim", end_section=is_last_of_step)
        console.print(table)
        for note in _notes(group) if with_notes else ():
            console.print(f"  not valid: {note}", style="dim", highlight=False)
