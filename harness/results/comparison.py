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
from harness.core.identity import digest_of_json
from harness.results import console as terminal
from harness.results import latex, markdown
from harness.results.folder import read_gates
from harness.results.rows import read_rows, write_csv

SIDES = ("defense", "baseline")
LONGEST_STEM = 120
"""Letters of a file name before its digest and ending."""
SHOWN_OF_TEST = (
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
"""Shown columns of a test."""
SHOWN = (*SHOWN_OF_TEST, ("valid", "valid"), ("utility", "utility"))
"""Shown columns. valid and utility: of the defense, then of the baseline."""
LEGEND = (
    "stronger by: how much less the attack reaches on the defense than on the baseline, mean over targets; above 0 "
    "the defense protects more. 95 %: covers chance in seeds and prompts (seeds: in seeds only) for these concepts; "
    "paired by concept, prompt and seed. p corrected: Holm over the attacks and the worst case of a task, metric and "
    "step. unclear: no significant difference; in brackets the least difference that is detectable at 80 % power. "
    "valid, utility: of the defense / of the baseline, as in the leaderboard; where one is not valid, a difference is "
    "no result."
)


def make(folder: Path, defense: str, baselines: Sequence[str]) -> list[dict[str, Any]]:
    """Compare, and write the comparison as .csv, .md and .tex into the folder (`stem`); return the lines.

    Raises UserMistake for a defense that is not in the run.
    """
    if defense in baselines:
        raise UserMistake(f"--baseline {one_line(defense)}: a defense is not compared with itself")
    baselines = list(dict.fromkeys(baselines))
    rows = read_rows(folder)
    try:
        lines = compare(rows, defense, baselines, gates=read_gates(folder))
    except ValueError as error:
        raise UserMistake(f"{one_line(folder)}: {one_line(error)}") from None
    if not lines:
        raise UserMistake(f"{one_line(folder)}: no attack was made on both in the same task")
    name = stem(defense, baselines)
    try:
        write_csv(folder / f"{name}.csv", lines, COLUMNS)
        said = Section(notes=tuple(sentences(lines)))
        write_text(folder / f"{name}.md", markdown.page([said, *sections(lines)], less_than="&lt;"))
        write_text(folder / f"{name}.tex", latex.page(sections(lines)))
    except OSError as error:
        raise UserMistake(f"{one_line(folder)}: cannot be written: {one_line(error.strerror)}") from None
    return lines


def stem(defense: str, baselines: Sequence[str]) -> str:
    """Return the name of a comparison's files without an ending: compare_DEFENSE_vs_BASELINE[_and_BASELINE...].

    Labels that a file name cannot hold as they are (other characters, capitals, which some file systems do not keep
    apart, the joining words, or too many letters) are changed, and a digest of the labels is added: two comparisons
    never have one name.
    """
    labels = [defense, *baselines]
    slugs = [re.sub(r"[^a-z0-9_-]", "_", label.lower())[:40] for label in labels]
    name = f"compare_{slugs[0]}_vs_{'_and_'.join(slugs[1:])}"
    is_plain = slugs == labels and not any(word in f"_{slug}_" for slug in slugs for word in ("_vs_", "_and_"))
    if is_plain and len(name) <= LONGEST_STEM:
        return name
    return f"{name[:LONGEST_STEM]}-{digest_of_json(labels)[:8]}"


def tables(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
    """Return the lines grouped by (task, metric, defense, baseline), one table per group."""
    grouped: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        grouped.setdefault(tuple(line[k] for k in ("task", "metric", "defense", "baseline")), []).append(line)
    return grouped


def sentences(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each task, metric, baseline and step (worst case, or the only attack); then what fails."""
    found = []
    for (task, metric, defense, baseline), group in tables(lines).items():
        for step in dict.fromkeys(line["step"] for line in group):
            at_step = [line for line in group if line["step"] == step]
            line = next((line for line in at_step if line["attack"] == WORST), at_step[0])
            reached = (
                f"{task}, {metric}: after {counted(step, 'step')} {_attacks(line, at_step)} reaches "
                f"{_number(line['reached_defense'])} on {defense} and {_number(line['reached_baseline'])} on {baseline}"
            )
            found.append(f"{reached}{_judgement(line, defense, baseline)}{_no_result(line)}")
    return found + _reasons(lines)


def _attacks(line: dict[str, Any], at_step: Sequence[dict[str, Any]]) -> str:
    if line["attack"] != WORST:
        return line["attack"]
    return f"the closest of {counted(len(at_step) - 1, 'attack')}"


def _judgement(line: dict[str, Any], defense: str, baseline: str) -> str:
    if line["verdict"] == "not tested":
        return "; one seed allows no claim about another run."
    chance = f"95 % {_between(line)} over {line['covers']}, corrected p {_p(line['p_corrected'])}"
    if line["verdict"] == "unclear":
        return f": no significant difference ({chance}; detectable at 80 % power: {_number(line['detectable'])})."
    better = defense if line["verdict"] == "stronger" else baseline
    return f": {better} protects more, by {_number(abs(line['stronger_by']))} ({chance})."


def _no_result(line: dict[str, Any]) -> str:
    """Return which side does not count; "" where both do."""
    names = [line[side] for side in SIDES if not line[f"valid_{side}"]]
    if not names:
        return ""
    return f" This is no result: {' and '.join(names)} {'does' if len(names) == 1 else 'do'} not count."


def _reasons(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return why lines do not count, once for each task and side."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for line in lines:
        for side in SIDES:
            parts = filter(None, line[f"reason_{side}"].split("; "))
            found.setdefault((line["task"], line[side]), {}).update(dict.fromkeys(parts))
    return [f"{task}: {name} does not count: {'; '.join(parts)}." for (task, name), parts in found.items() if parts]


def _number(value: float) -> str:
    """Return a number with three decimal digits, or fewer if it is large."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _between(line: dict[str, Any]) -> str:
    return f"{_number(line['low'])} to {_number(line['high'])}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def cells(line: dict[str, Any], shown: Sequence[tuple[str, str]] = SHOWN) -> list[str]:
    """Return the displayed cells of a line as text."""
    texts = []
    for column, _ in shown:
        value = line.get(column)
        if column == "interval":
            known = line["low"] is not None
            also = "" if line["covers"] == "seeds and prompts" else f" ({line['covers']})"
            texts.append(f"{_between(line)}{also}" if known else "–")
        elif column == "attack":
            texts.append(f"{value} ({line['attacker']})" if line["attacker"] == "adaptive" else value)
        elif column in ("p", "p_corrected"):
            texts.append(_p(value))
        elif column == "valid":
            texts.append(" / ".join("yes" if line[f"valid_{side}"] else "no" for side in SIDES))
        elif column == "utility":
            values = (line[f"utility_{side}"] for side in SIDES)
            texts.append(" / ".join("–" if value is None else f"{value:.2f}" for value in values))
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
            alignments="l" + "r" * (len(SHOWN) - 4) + "lll",
            level=3,
            ends=terminal.ends_of_groups([line["step"] for line in group]),
        )
        for key, group in tables(lines).items()
    ]
    return [*found, Section(text=(LEGEND,))]


def show(lines: Sequence[dict[str, Any]], console) -> None:
    """Print the comparison to a rich console: the tables, then the sentences."""
    terminal.show([*sections(lines), Section(notes=tuple(sentences(lines)))], console)
