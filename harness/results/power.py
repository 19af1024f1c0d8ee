"""`plan --power`: how many seeds a claim of a suite needs, from the rows of a pilot run, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.analysis.measurements import Measurements
from harness.analysis.power import MOST, POWER, seeds_needed
from harness.contracts.table import Section
from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.plan.graph import Plan
from harness.results import console as terminal
from harness.results.rows import read_rows

if TYPE_CHECKING:
    from rich.console import Console

LEGEND = (
    f"The number of seeds with which `compare` finds a true difference of this size in {100 * POWER:.0f} of 100 runs, "
    "at the level of 5 % over the attacks and the worst case, which are corrected together. As the pilot varied: by "
    "its estimated variances, means over the pairs of its defenses. To be safe: by upper limits of these variances, "
    "which are above the truth in four of five pilots with so few seeds. For the pilot's concepts and its number of "
    "prompts; the last column lists which chance is covered."
)


@dataclass(frozen=True)
class Question:
    """The input of `plan --power`."""

    difference: float
    """Between two defenses: in each metric's unit, or as a share of the attack's score on the undefended model."""
    is_share: bool = False
    pilot: Path | None = None
    """The folder of the pilot run; None: the suite's own run."""
    between: tuple[str, str] | None = None
    """Two defenses of the pilot run; None: all pairs."""


def show(plan: Plan, seeds: int, question: Question, own_folder: Path, console: Console) -> None:
    """Print how many seeds a difference needs, for each task, metric and attack that both pilot and plan have.

    Raises UserMistake if the pilot is too small.
    """
    folder, between, is_share = question.pilot or own_folder, question.between, question.is_share
    if question.pilot is None and not (folder / "rows.csv").is_file():
        raise UserMistake(
            f"--power: {one_line(folder)} has no rows.csv yet; run this suite with two seeds or more, or name the "
            "folder of another run with --pilot"
        )
    table = Measurements(read_rows(folder))
    known = list(dict.fromkeys(name for of in table.defenses.values() for name in of))
    for name in between or ():
        if name not in known:
            what = f"no defense '{one_line(name, 60)}' in {one_line(folder)}; there are {', '.join(known) or 'none'}"
            raise UserMistake(f"--between: {what}")
    if between and between[0] == between[1]:
        raise UserMistake("--between: name two different defenses")
    asked = {
        (each.labels["task"], metric, each.labels["attack"]): None
        for each in plan.measurements
        if each.labels.get("attack")
        for metric in each.scores
    }
    if not asked:
        raise UserMistake("--power: the suite has no attack, so it compares no two defenses")
    there = {(task, metric, attack) for task, attack, _, metric, _ in table.groups}
    if not there & set(asked):
        first = "/".join(next(iter(asked)))
        has = f"; it has {', '.join('/'.join(key) for key in sorted(there)[:3])}" if there else ""
        what = f"holds none of the suite's task/metric/attack such as {first}{has}"
        raise UserMistake(f"--pilot {one_line(folder)}: {one_line(what, 400)}")
    lines = seeds_needed(
        table, question.difference, is_share=is_share, planned_seeds=seeds, asked=set(asked), between=between
    )
    if not lines:
        what = "no attack was made on two defenses in the same task that affect it"
        raise UserMistake(f"--pilot {one_line(folder)}: {what}")
    if all(line["limit"] == "one seed" for line in lines):
        raise UserMistake(f"--pilot {one_line(folder)}: one seed allows no claim about another run; a pilot needs two")
    terminal.show(_sections(lines, is_share, seeds), console)
    missing = [key for key in asked if key not in there and key[1] != table.guard]
    if missing:
        named = ", ".join(" / ".join(key) for key in missing[:5]) + (", …" if len(missing) > 5 else "")
        console.print(f"not in the pilot: {named}", highlight=False)


def _sections(lines: Sequence[dict[str, Any]], is_share: bool, seeds: int) -> list[Section]:
    """Return a table for each task and metric, then the legend."""
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        tables.setdefault((line["task"], line["metric"]), []).append(line)
    headers = (
        "attack", "step", "difference", f"{counted(seeds, 'seed')}, as planned, {'finds' if seeds == 1 else 'find'}",
        "seeds needed, as the pilot varied", "to be safe", "covers chance in",
    )  # fmt: skip
    found = []
    for (task, metric), group in tables.items():
        first = group[0]
        title = (
            f"{task} / {metric} ({first['unit']}): {counted(first['n_targets'], 'target')}, "
            f"{counted(first['n_prompts'], 'prompt')}; pilot of {counted(first['pilot_seeds'], 'seed')}, "
            f"{counted(first['n_pairs'], 'pair')} of defenses"
        )
        rows = [cells(line, is_share) for line in group]
        found.append(Section(title, headers=headers, rows=rows, alignments="lrrrrrl"))
    return [*found, Section(text=(LEGEND,))]


def cells(line: dict[str, Any], is_share: bool) -> list[str]:
    """Return the displayed cells of a line as text."""
    attack = f"{line['attack']} ({line['attacker']})" if line["attacker"] == "adaptive" else line["attack"]
    none = line["reached_none"] if is_share else None
    return [
        attack,
        str(line["step"]),
        _amount(line["difference"], none),
        _amount(line["detectable"], none),
        _seeds(line["seeds"], line["limit"]),
        _seeds(line["seeds_safe"], line["limit_safe"]),
        line["covers"],
    ]


def _amount(value: float | None, none: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{text} ({100 * value / none:.0f} %)" if none is not None and none > 0 else text


def _seeds(count: int | None, limit: str) -> str:
    """Return the number of seeds, or the reason why there is none."""
    words = {
        "prompts": f"not even {MOST}: more prompts are needed",
        "seeds": f"more than {MOST}",
        "one seed": "the pilot has one seed",
        "undefined": "nothing is reached undefended",
    }
    return words[limit] if count is None else str(count)
