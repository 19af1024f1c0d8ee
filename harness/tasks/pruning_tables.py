"""The tables of pruning tasks: their columns for machines, their sections for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.contracts.table import Figure, Section, Table
from harness.tasks import pruning_columns as columns
from harness.tasks import pruning_figures as figures
from harness.tasks import pruning_lines as lines_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun

Line = dict[str, Any]
SUPPRESSION, COST_TITLE, ATTACKS = "Suppression and quality", "Cost of students", "After attacks"
SUPPRESSION_NOTES = (
    "Mean over concepts, prompts and seeds, with its 95 % interval. +, -: differs from the control (distilled only) in "
    "paired tests, corrected over recipes (Holm); without a sign chance explains the difference.",
    "target, works: drawn targets against the base model's images of them, and against real works; low is wanted. cp: "
    "share of a target's prompts that fit the image less than the unpruned model's image of the same seed (the paper's "
    "CP score has its own distilled model as reference: ours differs). general: held-out captions that name no target.",
)
ATTACK_NOTES = (
    "none: the control, distilled only; sgr: how far below it an attack's images stay, in %, and its interval. "
    "recovery: the attack's gain over the control's. One line for the last step of each attack.",
)


def of(run: MeasuredRun, rows: DataFrame) -> Iterator[Table | Figure]:
    """Yield the tables and figures of a run."""
    if "part" not in rows or not len(rows):
        return
    lines = lines_of.of(rows)
    yield Table("suppression", columns.MEASURES, lines, [_suppression(lines, name) for name in _tasks(lines)])
    costs = list(lines_of.costs(rows, run))
    yield Table("student_cost", columns.COST, costs, [_cost(costs)])
    yield Figure("suppression_tradeoff", partial(figures.tradeoff, lines))
    yield Figure("suppression_sheet", partial(figures.sheet, run, rows))
    grid = rows[rows["part"] == "grid"]
    if (grid["attack"] != "").any():
        yield from _attacked(run, grid)


def _attacked(run: MeasuredRun, grid: DataFrame) -> Iterator[Table | Figure]:
    """Yield the tables of the attack grid: the control is what gaps are measured against."""
    from harness.analysis.claims import claims
    from harness.analysis.curves import COLUMNS as CURVE_COLUMNS
    from harness.analysis.curves import curves
    from harness.analysis.leaderboard import COLUMNS, leaderboard
    from harness.analysis.measurements import Measurements
    from harness.results.figures import recovery_curves

    measured = Measurements(grid)
    found = claims(measured, leaderboard(measured, run.gates))
    yield Table("student_attacks", COLUMNS, found.lines, [_attacks(found.lines)])
    yield Table("student_curves", CURVE_COLUMNS, curves(measured))
    yield Figure("student_recovery", partial(recovery_curves, measured, role="target"))


def _tasks(lines: Sequence[Line]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((line["task"], line["targets"]) for line in lines))


def _suppression(lines: Sequence[Line], of: tuple[str, str]) -> Section:
    """Return one table for a task and a set of targets: a row a model, a column a measure and metric."""
    own = [line for line in lines if (line["task"], line["targets"]) == of]
    measures = list(dict.fromkeys((line["measure"], line["metric"]) for line in own))
    recipes = list(dict.fromkeys(line["recipe"] for line in own))
    known = {(line["recipe"], line["measure"], line["metric"]): line for line in own}
    rows = [
        [recipe, *(_value(known.get((recipe, *each))) for each in measures)] for recipe in recipes
    ]  # fmt: skip
    headers = ("model", *(f"{measure}: {metric}" for measure, metric in measures))
    seeds = max(line["n_seeds"] for line in own)
    return Section(
        f"{SUPPRESSION}: {of[0]}, {of[1]}", (f"{seeds} seeds.",), headers, rows, "l" + "r" * len(measures),
        SUPPRESSION_NOTES,
    )  # fmt: skip


def _value(line: Line | None) -> str:
    """Return a mean with its interval, and the sign of a difference that chance does not explain."""
    if line is None or line["value"] is None:
        return "–"
    text = f"{line['value']:.3g}"
    if line["value_low"] is not None:
        text += f" [{line['value_low']:.3g}, {line['value_high']:.3g}]"
    if line["p"] is not None and line["p"] < 0.05:
        text += " +" if line["difference"] > 0 else " -"
    return text


def _cost(costs: Sequence[Line]) -> Section:
    headers = (
        "task", "targets", "model", "MACs kept", "parameters", "trained", "lower samples", "upper samples", "passes",
        "training s", "GB", "drawing s",
    )  # fmt: skip
    rows = [
        [
            line["task"], line["targets"], line["recipe"], f"{line['macs_share']:.3f}", *(
                _count(line[name])
                for name in ("parameters", "trainable_parameters", "lower_samples", "upper_samples", "passes",
                             "training_seconds")
            ),
            "–" if line["training_bytes"] is None else f"{line['training_bytes'] / 1e9:.2f}",
            _count(line["drawing_seconds"]),
        ]
        for line in costs
    ]  # fmt: skip
    note = ("Samples: images that the losses of both levels read. Seconds and memory: of the stages' machines.",)
    return Section(COST_TITLE, (), headers, rows, "lll" + "r" * (len(headers) - 3), note)


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _attacks(lines: Sequence[Line]) -> Section:
    last = {}
    for line in lines:
        place = line["task"], line["attack"], line["attacker"], line["metric"]
        last[place] = max(line["step"], last.get(place, 0))
    headers = (
        "task", "attack", "metric", "step", "recipe", "before", "after", "control after", "sgr", "recovery", "valid",
    )  # fmt: skip
    rows = [
        [
            line["task"], line["attack"], line["metric"], str(line["step"]), line["defense"],
            *(_plain(line[name]) for name in ("target_before", "target_defended", "target_none")), _sgr(line),
            _plain(line["recovery"]), "yes" if line["valid"] else f"no: {line['reason']}",
        ]
        for line in lines
        if line["step"] == last[line["task"], line["attack"], line["attacker"], line["metric"]]
    ]  # fmt: skip
    return Section(ATTACKS, (), headers, rows, "lllrlrrrrrl", ATTACK_NOTES)


def _sgr(line: Line) -> str:
    if line["sgr"] is None:
        return "–"
    low, high = line["sgr_low"], line["sgr_high"]
    bounds = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * line['sgr']:.1f}{bounds}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
