"""`compare`: two or more defenses of a finished run side by side, as text, CSV, Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.analysis.compare import COLUMNS, WORST, compare
from harness.contracts.table import Section
from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.core.files import write_text
from harness.results import console as terminal
from harness.results import latex, markdown
from harness.results.rows import read_rows, write_csv

SHOWN = (
    ("attack", "attack"),
    ("step", "step"),
    ("reached_none", "undefended"),
    ("reached_baseline", "baseline"),
    ("reached_defense", "defense"),
    ("stronger_by", "stronger by"),
    ("interval", "95 %"),
    ("p", "p"),
    ("p_corrected", "p corrected"),
    ("retained_by", "innocents better by"),
    ("verdict", "verdict"),
)
LEGEND = (
    "stronger by: how much less the attack reaches on the defense than on the baseline, mean over targets; above 0 "
    "the defense protects more. 95 %: covers chance in seeds and prompts (seeds: in seeds only) for these concepts; "
    "paired by concept, prompt and seed. p corrected: Holm over the attacks and the worst case of a task, metric and "
    "step. unclear: no significant difference; in brackets the least difference that is detectable at 80 % power."
)


def make(folder: Path, defense: str, baselines: Sequence[str]) -> list[dict[str, Any]]:
    """Compare, and write compare_<defense>.csv, .md and .tex into the folder; return the lines.

    Raises UserMistake for a defense that is not in the run.
    """
    if defense in baselines:
        raise UserMistake(f"--baseline {one_line(defense)}: a defense is not compared with itself")
    try:
        lines = compare(read_rows(folder), defense, list(dict.fromkeys(baselines)))
    except ValueError as error:
        raise UserMistake(f"{one_line(folder)}: {one_line(error)}") from None
    if not lines:
        raise UserMistake(f"{one_line(folder)}: no attack was made on both in the same task")
    stem = f"compare_{re.sub(r'[^A-Za-z0-9_-]', '_', defense)[:60]}"
    try:
        write_csv(folder / f"{stem}.csv", lines, COLUMNS)
        said = Section(notes=tuple(sentences(lines)))
        write_text(folder / f"{stem}.md", markdown.page([said, *sections(lines)], less_than="&lt;"))
        write_text(folder / f"{stem}.tex", latex.page(sections(lines)))
    except OSError as error:
        raise UserMistake(f"{one_line(folder)}: cannot be written: {one_line(error.strerror)}") from None
    return lines


def tables(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
    """Return the lines grouped by (task, metric, defense, baseline), one table per group."""
    grouped: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        grouped.setdefault(tuple(line[k] for k in ("task", "metric", "defense", "baseline")), []).append(line)
    return grouped


def sentences(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each task, metric and baseline: the worst case, or the only attack, at the last step."""
    found = []
    for (task, metric, defense, baseline), group in tables(lines).items():
        last = max(line["step"] for line in group)
        at_last = [line for line in group if line["step"] == last]
        line = next((line for line in at_last if line["attack"] == WORST), at_last[0])
        attacks = f"the closest of {counted(len(at_last) - 1, 'attack')}" if line["attack"] == WORST else line["attack"]
        reached = (
            f"{task}, {metric}: after {counted(last, 'step')} {attacks} reaches {_number(line['reached_defense'])} "
            f"on {defense} and {_number(line['reached_baseline'])} on {baseline}"
        )
        found.append(f"{reached}{_judgement(line, defense, baseline)}")
    return found


def _judgement(line: dict[str, Any], defense: str, baseline: str) -> str:
    if line["verdict"] == "not tested":
        return "; one seed allows no claim about another run."
    chance = f"95 % {_between(line)} over {line['covers']}, corrected p {_p(line['p_corrected'])}"
    if line["verdict"] == "unclear":
        return f": no significant difference ({chance}; detectable at 80 % power: {_number(line['detectable'])})."
    better = defense if line["verdict"] == "stronger" else baseline
    return f": {better} protects more, by {_number(abs(line['stronger_by']))} ({chance})."


def _number(value: float) -> str:
    """Return a number with three decimal digits, or fewer if it is large."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _between(line: dict[str, Any]) -> str:
    return f"{_number(line['low'])} to {_number(line['high'])}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def cells(line: dict[str, Any]) -> list[str]:
    """Return the displayed cells of a line as text."""
    texts = []
    for column, _ in SHOWN:
        value = line.get(column)
        if column == "interval":
            known = line["low"] is not None
            also = "" if line["covers"] == "seeds and prompts" else f" ({line['covers']})"
            texts.append(f"{_between(line)}{also}" if known else "–")
        elif column == "attack":
            texts.append(f"{value} ({line['attacker']})" if line["attacker"] == "adaptive" else value)
        elif column in ("p", "p_corrected"):
            texts.append(_p(value))
        elif column == "verdict":
            texts.append(f"unclear ({_number(line['detectable'])})" if value == "unclear" else value)
        elif isinstance(value, float):
            is_gap = column in ("stronger_by", "retained_by")
            texts.append(("+" if is_gap and value > 0 else "") + _number(value))
        else:
            texts.append("–" if value is None else str(value))
    return texts


def _title(task: str, metric: str, defense: str, baseline: str, group: Sequence[dict[str, Any]]) -> str:
    first = group[0]
    return (
        f"{defense} against {baseline}: {task}, {metric} ({first['unit']}), {counted(first['n_targets'], 'target')}, "
        f"{counted(first['n_innocents'], 'innocent')}, {counted(first['n_seeds'], 'seed')}"
    )


def sections(lines: Sequence[dict[str, Any]]) -> list[Section]:
    """Return a table for each task, metric, defense and baseline, then the legend."""
    found = [
        Section(
            title=_title(*key, group),
            headers=tuple(header for _, header in SHOWN),
            rows=[cells(line) for line in group],
            alignments="l" + "r" * (len(SHOWN) - 2) + "l",
            level=3,
            ends=terminal.ends_of_groups([line["step"] for line in group]),
        )
        for key, group in tables(lines).items()
    ]
    return [*found, Section(text=(LEGEND,))]


def show(lines: Sequence[dict[str, Any]], console) -> None:
    """Print the comparison to a rich console: the tables, then the sentences."""
    terminal.show([*sections(lines), Section(notes=tuple(sentences(lines)))], console)
