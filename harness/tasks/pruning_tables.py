"""The tables of pruning tasks: their columns for machines, their sections for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.contracts.table import Figure, Section, Table
from harness.core.counted import counted
from harness.tasks import paper_sections
from harness.tasks import pruning_columns as columns
from harness.tasks import pruning_figures as figures
from harness.tasks import pruning_lines as lines_of
from harness.tasks import pruning_pairs as pairs_of
from harness.tasks.pruning_values import leading_target_metric, over_all, shown_measures

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun

Line = dict[str, Any]
SUPPRESSION, COST_TITLE, ATTACKS = "Suppression and quality", "Cost of students", "After attacks"
SUPPRESSION_NOTES = (
    "Mean over concepts, prompts and seeds, with its 95 % interval. +, -: differs from the control (distilled only) in "
    "paired tests, corrected over recipes (Holm); without a sign chance explains the difference.",
    "target, works: drawn targets against the base model's images of them, and against real works; low is wanted. cp: "
    "share of a target's prompts that fit the image less than the unpruned model's image of the same seed; "
    "cp_distilled: less than the control's, the paper's kind of reference, where 0.5 is chance. general: held-out "
    "captions that name no target.",
    "Other metrics of targets, innocents and utility: in suppression.csv.",
)
ATTACK_NOTES = (
    "Similarity to the targets after an attack. difference: to the control after the same attack, with its 95 % "
    "interval; *: not explained by chance (paired tests, corrected over recipes by Holm). regained: the share of what "
    "a recipe suppressed, against the control, that the attack brings back; empty where nothing is shown to be "
    "suppressed. Other metrics and each set of targets are in student_attacks.csv.",
)


def of(run: MeasuredRun, rows: DataFrame) -> Iterator[Table | Figure]:
    """Yield the tables and figures of a run."""
    if "part" not in rows or not len(rows):
        return
    lines = lines_of.of(rows)
    sections = [_suppression(lines, name) for name in _tasks(lines)]
    sections[-1] = replace(sections[-1], notes=SUPPRESSION_NOTES)
    sections += paper_sections.of(run, "pruned_bilevel", "suppression", [*lines, {"method": "none"}])
    yield Table("suppression", columns.MEASURES, lines, sections)
    pairs, equal = list(pairs_of.pairs(rows)), list(pairs_of.at_equal_quality(rows))
    yield Table("recipe_pairs", columns.PAIRS, pairs, [_pairs(pairs, lines)] if pairs else [])
    yield Table("suppression_at_equal_quality", columns.EQUAL, equal, [_equal(equal, lines)] if equal else [])
    costs = list(lines_of.costs(rows, run))
    yield Table("student_cost", columns.COST, costs, [_cost(costs)])
    yield Figure("suppression_tradeoff", partial(figures.tradeoff, lines))
    yield Figure("suppression_sheet", partial(figures.sheet, run, rows))
    grid = rows[rows["part"] == "grid"]
    if (grid["attack"] != "").any():
        yield from _attacked(rows, leading_target_metric(lines))


def _attacked(rows: DataFrame, leading: str | None) -> Iterator[Table | Figure]:
    """Yield the tables of what attacks bring back, for people over all sets of targets by one metric, and curves."""
    from harness.analysis.measurements import Measurements
    from harness.results.figures import recovery_curves

    lines = lines_of.attacks(rows)
    soon = lines_of.soon(lines)
    shown = [[line for line in over_all(listed) if line["metric"] == leading] for listed in (lines, soon)]
    yield Table("student_attacks", columns.ATTACKED, lines, [_attacks(shown[0])])
    yield Table("student_recovery", columns.SOON, soon, [_soon(shown[1])] if shown[1] else [])
    yield Figure("student_curves", partial(recovery_curves, Measurements(rows[rows["part"] == "grid"]), role="target"))


def _tasks(lines: Sequence[Line]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((line["task"], line["targets"]) for line in lines))


def _suppression(lines: Sequence[Line], of: tuple[str, str]) -> Section:
    """Return one table for a task and a set of targets: a row a model, a column a measure and metric."""
    own = [line for line in lines if (line["task"], line["targets"]) == of]
    measures = shown_measures(own)
    recipes = list(dict.fromkeys(line["recipe"] for line in own))
    known = {(line["recipe"], line["measure"], line["metric"]): line for line in own}
    rows = [
        [recipe, *(_value(known.get((recipe, *each))) for each in measures)] for recipe in recipes
    ]  # fmt: skip
    headers = ("model", *(f"{measure}: {metric}" for measure, metric in measures))
    seeds = max(line["n_seeds"] for line in own)
    title = f"{SUPPRESSION}: {of[0]}, {of[1]}"
    return Section(title, (f"{counted(seeds, 'seed')}.",), headers, rows, "l" + "r" * len(measures))


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


def _pairs(pairs: Sequence[Line], lines: Sequence[Line]) -> Section:
    """Return the differences of pairs over all sets of targets: metrics of sets, and similarity to the targets."""
    wanted = leading_target_metric(lines)
    shown = [
        line for line in over_all(pairs)
        if (line["measure"] == "general" and line["direction"] == "lower") or line["measure"] == "works"
        or (line["measure"], line["metric"]) == ("target", wanted)
    ]  # fmt: skip
    measures = list(dict.fromkeys((line["measure"], line["metric"]) for line in shown))
    known = {
        (line["task"], line["targets"], line["recipe"], line["other"], line["measure"], line["metric"]): line
        for line in shown
    }
    rows = [
        [*place[:2], f"{place[2]} - {place[3]}", *(
            _difference(known[(*place, *each)]) if (*place, *each) in known else "–" for each in measures
        )]
        for place in dict.fromkeys(each[:4] for each in known)
    ]  # fmt: skip
    headers = ("task", "targets", "recipes", *(f"{measure}: {metric}" for measure, metric in measures))
    note = (
        "Differences paired by set of targets, concept, prompt and seed, with their 95 % interval. *: not explained by "
        "chance (corrected over pairs by Holm).",
    )
    return Section("Recipes against each other", (), headers, rows, "lll" + "r" * len(measures), note)


def _equal(equal: Sequence[Line], lines: Sequence[Line]) -> Section:
    """Return the differences at equal quality: a row a recipe and curve, a column a metric of quality."""
    wanted = ("target", leading_target_metric(lines))
    shown = [line for line in over_all(equal) if (line["measure"], line["metric"]) == wanted]
    qualities = list(dict.fromkeys(line["quality"] for line in shown))
    names = ("task", "targets", "recipe", "curve")
    known = {(*(line[name] for name in names), line["quality"]): line for line in shown}
    rows = []
    for place in dict.fromkeys(key[:-1] for key in known):
        own = [known.get((*place, quality)) for quality in qualities]
        one = next(line for line in own if line is not None)
        rows.append([
            *place[:3], _plain(one["recipe_similarity"]), f"{place[3]} ({one['n_settings']} settings)",
            *("–" if line is None else _difference(line) for line in own),
        ])  # fmt: skip
    headers = ("task", "targets", "recipe", "similarity", "beside the curve of", *(f"equal {q}" for q in qualities))
    notes = (
        "A curve joins the control and recipes of one method in different strengths. equal: the recipe's similarity to "
        "its targets less the least that the curve reaches at the recipe's quality or a better one, linear between "
        "settings, with its 95 % interval; *: not explained by chance (Holm). –: the recipe is worse in quality than "
        "any setting of the curve; one that is better than any is compared with the curve's best end.",
        f"By {wanted[1]}; other metrics and each set of targets are in suppression_at_equal_quality.csv.",
    )
    return Section("Suppression at equal quality", (), headers, rows, "lllrl" + "r" * len(qualities), notes)


def _cost(costs: Sequence[Line]) -> Section:
    headers = (
        "task", "targets", "model", "MACs kept", "parameters", "trained", "trained to suppress", "general samples",
        "concept samples", "passes", "training s", "GB", "drawing s",
    )  # fmt: skip
    rows = [
        [
            line["task"], line["targets"], line["recipe"], f"{line['macs_share']:.3f}", *(
                _count(line[name])
                for name in ("student_parameters", "trainable_parameters", "concept_parameters", "general_samples",
                             "concept_samples", "training_passes", "training_seconds")
            ),
            "–" if line["training_bytes"] is None else f"{line['training_bytes'] / 1e9:.2f}",
            _count(line["drawing_seconds"]),
        ]
        for line in costs
    ]  # fmt: skip
    note = (
        "Samples: images that the losses read, with repeats; general ones, and those of concepts. Seconds and memory: "
        "of the stages' machines.",
    )
    return Section(COST_TITLE, (), headers, rows, "lll" + "r" * (len(headers) - 3), note)


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _attacks(lines: Sequence[Line]) -> Section:
    headers = (
        "task", "targets", "attack", "metric", "step", "recipe", "before", "after", "control after", "difference",
        "regained %",
    )  # fmt: skip
    rows = [
        [
            line["task"], line["targets"], _called(line), line["metric"], str(line["step"]), line["recipe"],
            *(_plain(line[name]) for name in ("before", "after", "control_after")), _difference(line), _share(line),
        ]
        for line in lines
    ]  # fmt: skip
    return Section(ATTACKS, (), headers, rows, "llllrlrrrrr", ATTACK_NOTES)


def _called(line: Line) -> str:
    return line["attack"] if line["attacker"] == "honest" else f"{line['attack']} ({line['attacker']})"


def _difference(line: Line) -> str:
    if line["difference"] is None:
        return "–"
    bounds = ""
    if line["difference_low"] is not None:
        bounds = f" [{line['difference_low']:.3f}, {line['difference_high']:.3f}]"
    sure = "*" if line["p"] is not None and line["p"] < 0.05 else ""
    return f"{line['difference']:+.3f}{bounds}{sure}"


def _share(line: Line) -> str:
    if line["regained"] is None:
        return "–"
    low, high = line["regained_low"], line["regained_high"]
    return f"{100 * line['regained']:.0f}" + ("" if low is None else f" [{100 * low:.0f}, {100 * high:.0f}]")


def _soon(lines: Sequence[Line]) -> Section:
    headers = ("task", "targets", "attack", "metric", "recipe", "half at step", "90 % at step")
    rows = [
        [
            line["task"], line["targets"], _called(line), line["metric"], line["recipe"],
            *(f"above {line['last_read_step']}" if line[name] is None else str(line[name])
              for name in ("half_step", "most_step")),
        ]
        for line in lines
    ]  # fmt: skip
    note = ("The first step that was read at which an attack had brought back half, or 90 %, of what was suppressed.",)
    return Section("How soon concepts come back", (), headers, rows, "lllllrr", note)


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
