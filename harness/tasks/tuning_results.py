"""Results of tuned defenses: every probe of their searches, and default and tuned rows side by side.

Files: tuning.csv and .md, a line for each probe; tuned.csv and .md, a line for each leaderboard line of a tuned defense
with that of the same defense as it was stated, and what the search cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.analysis.definitions import OURS, Definition
from harness.contracts.diagnostic import Diagnostic, MeasuredRun, PageSection, ReleasedModel
from harness.contracts.table import Section, Table
from harness.core.identity import canonical_json
from harness.core.registry import register
from harness.core.tuning import CHOSEN, PROPOSAL
from harness.results.reading import mean_of, read_table
from harness.stages.tune import SEARCH

PROBES, TUNED = "tuning", "tuned"
PROBE_COLUMNS = (
    "task", "defense", "method", "search_seeds", "probe", "is_repeat", "tried_setting", "tuning_immunity",
    "tuning_utility", "passes_floor", "is_chosen", "void", "probe_passes", "probe_seconds",
)  # fmt: skip
_COMPARED = ("sgr", "recovery", "utility", "valid")
TUNED_COLUMNS = (
    "task", "attack", "attacker", "metric", "step", "defense", "default", "tuning_probes", "searches", "search_passes",
    "search_seconds", *(name for column in _COMPARED for name in (column, f"{column}_default")),
)  # fmt: skip
_STATED = "as stated"

DEFINITIONS = (
    Definition(
        "search_seeds", "seeds of the search", "", "The seeds whose releases use this search, joined by +.", OURS
    ),
    Definition("probe", "probe", "", "Its number in the search; 1 is the defense as the suite states it.", OURS),
    Definition(
        "is_repeat", "repeat", "",
        "Whether it repeats the stated or the best setting under another seed, to see whether that is better again.",
        OURS,
    ),
    Definition(
        "tried_setting", "setting", "",
        "The changed parameters, as JSON; {}: the defense as the suite states it. Empty: a repeat that was not needed.",
        OURS,
    ),
    Definition(
        "tuning_immunity", "immunity in the search", "1 - recovered",
        "On the tuning targets, by the objective of the suite's `tuning`: the recovered share (M_defense - M_before) / "
        "(M_none - M_before) at the attack's best step and metric (worst), or as the mean over log steps by the best "
        "metric (area). Empty: void.",
        OURS,
    ),
    Definition(
        "tuning_utility", "utility in the search", "",
        "On the tuning innocents before any attack, as `utility`, by the metric that keeps least.", OURS,
    ),
    Definition("passes_floor", "passes", "", "Whether every metric keeps the floor of the suite's `tuning`.", OURS),
    Definition("is_chosen", "chosen", "", "Whether the measured releases use this setting.", OURS),
    Definition("void", "void", "", "Why a probe has no result: it diverged, or a repeat was not needed.", OURS),
    Definition(
        "probe_passes", "UNet passes of the probe", "forward + 2 backward",
        "Of the release, the attack and the drawing; the undefended model's are shared, and not counted.", OURS,
    ),
    Definition("probe_seconds", "seconds of the probe", "", "Stage time, of the same stages and their scores.", OURS),
    Definition(
        "default", "default", "", "The label of the same defense as it is stated; empty: the suite has none.", OURS
    ),
    Definition("tuning_probes", "probes", "", "Probes of each search of a tuned defense; 0: not tuned.", OURS),
    Definition("searches", "searches", "", "How many searches chose the settings of the line.", OURS),
    Definition("search_passes", "UNet passes of the searches", "", "Sum of `probe_passes` over all searches.", OURS),
    Definition("search_seconds", "seconds of the searches", "", "Sum of `probe_seconds` over all searches.", OURS),
    *(
        Definition(f"{column}_default", f"{column} of the default", "", f"`{column}` in the line of `default`.", OURS)
        for column in _COMPARED
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The searches of a run."""

    probes: Sequence[dict[str, Any]]
    """Lines of tuning.csv."""
    tuned: Sequence[dict[str, Any]]
    """Lines of tuned.csv."""
    counts: Mapping[tuple[str, str], int]
    """(task, defense) -> probes of each search."""


@register("diagnostic")
class TuningDiagnostic(Diagnostic):
    """Searches of tuned defenses: what was tried, what was chosen, and what it changed."""

    name = "tuning"
    version = 1
    title = "Tuned defenses"
    definitions = DEFINITIONS

    def of(self, run: MeasuredRun) -> Found | None:
        """Return the searches of the run; None if no defense is tuned."""
        released = list(run.released())
        tuned = [model for model in released if CHOSEN in model.stage.inputs]
        if not tuned:
            return None
        probes = [line for models in _by_search(tuned).values() for line in _probes(models, run)]
        counts: dict[tuple[str, str], int] = {}
        for line in probes:
            name = (line["task"], line["defense"])
            counts[name] = max(counts.get(name, 0), line["probe"])
        return Found(probes, _beside_default(run, probes, counts, _defaults(tuned, released)), counts)

    def files(self, found: Found, run: MeasuredRun) -> Iterator[Table]:
        """Yield both tables."""
        yield Table(PROBES, PROBE_COLUMNS, found.probes, [_probe_section(found.probes)])
        yield Table(TUNED, TUNED_COLUMNS, found.tuned, [_tuned_section(found.tuned)])

    def extend(self, table: Table, found: Found, run: MeasuredRun) -> Table:
        """Add the number of probes to each line of the leaderboard."""
        if table.name != "leaderboard":
            return table
        lines = [
            {**line, "tuning_probes": found.counts.get((line["task"], line["defense"]), 0)} for line in table.lines
        ]
        return replace(table, columns=(*table.columns, "tuning_probes"), lines=lines)

    def section(self, folder: Path) -> PageSection | None:
        """Return the section on tuned defenses; None if there are none."""
        probes, tuned = read_table(folder / f"{PROBES}.csv"), read_table(folder / f"{TUNED}.csv")
        if not probes:
            return None
        numbers = ("probe", "tuning_immunity", "tuning_utility", "probe_passes", "probe_seconds")
        last: dict[tuple[str, ...], int] = {}
        for line in tuned:
            name = (line["task"], line["attack"], line["attacker"])
            last[name] = max(last.get(name, 0), int(line["step"]))
        shown = [line for line in tuned if int(line["step"]) == last[line["task"], line["attack"], line["attacker"]]]
        sides = [f"{column}{end}" for column in _COMPARED[:3] for end in ("", "_default")]
        more = ("tuning_probes", "searches", "search_passes", "search_seconds", "step")
        return PageSection(
            title="Tuned defenses",
            anchor="tuned",
            template=Path(__file__).with_name("tuning.html.jinja").read_text(encoding="utf-8"),
            context={
                "probes": [{**line, **{name: mean_of([line], name) for name in numbers}} for line in probes],
                "tuned": [{**line, **{name: mean_of([line], name) for name in (*sides, *more)}} for line in shown],
            },
            data=(f"{PROBES}.csv", f"{TUNED}.csv"),
        )


def _by_search(tuned: Sequence[ReleasedModel]) -> dict[tuple[str, str, str], list[ReleasedModel]]:
    """Return (task, defense, key of the choice) -> its releases."""
    found: dict[tuple[str, str, str], list[ReleasedModel]] = {}
    for model in tuned:
        found.setdefault((model.task, model.defense, model.stage.inputs[CHOSEN].key), []).append(model)
    return found


def _probes(models: Sequence[ReleasedModel], run: MeasuredRun) -> Iterator[dict[str, Any]]:
    """Yield the lines of one search, whose setting these models have."""
    model = models[0]
    choice = model.stage.inputs[CHOSEN]
    run.store.require_for_reading(choice.kind, choice.key)
    found = json.loads((run.store.path(choice.kind, choice.key) / SEARCH).read_text(encoding="utf-8"))
    stages = run.stages
    for index, probe in enumerate(found["probes"]):
        passes, seconds = _cost(run, stages[choice.key].inputs[f"result.{index}"].key)
        utilities = probe.get("utility")
        yield {
            "task": model.task,
            "defense": model.defense,
            "method": model.method,
            "search_seeds": "+".join(str(seed) for seed in sorted({each.seed for each in models})),
            "probe": index + 1,
            "is_repeat": index >= found["explored"],
            "tried_setting": "" if probe["values"] is None else canonical_json(probe["values"]),
            "tuning_immunity": probe.get("immunity"),
            "tuning_utility": min(utilities.values()) if utilities else None,
            "passes_floor": probe.get("passes"),
            "is_chosen": index == found["chosen"],
            "void": probe["void"] or "",
            "probe_passes": passes,
            "probe_seconds": seconds,
        }


def _cost(run: MeasuredRun, assessed: str) -> tuple[float, float]:
    """Return (UNet passes, seconds) of the stages of a probe, from their records."""
    stages = run.stages
    proposal = stages[assessed].inputs[PROPOSAL]
    own: dict[str, None] = {}
    waiting = [read.key for read in stages[assessed].inputs.values()]
    while waiting:
        key = waiting.pop()
        if key in own:
            continue
        reads = stages[key].inputs
        is_score = stages[key].kind == "score" and any(
            stages[read.key].inputs.get(PROPOSAL) == proposal for read in reads.values()
        )
        if reads.get(PROPOSAL) == proposal or is_score:
            own[key] = None
            waiting += [read.key for read in reads.values()]
    records = [run.store.record(stages[key].kind, key) for key in own]
    passes = sum(r["ledger"]["forward_passes"] + 2 * r["ledger"]["backward_passes"] for r in records)
    return passes, round(sum(record["seconds"] for record in records), 4)


def _defaults(tuned: Sequence[ReleasedModel], released: Sequence[ReleasedModel]) -> dict[tuple[str, str], str]:
    """Return (task, tuned defense) -> the defense of the same method and stated parameters that is not tuned."""
    found = {}
    for model in tuned:
        for other in released:
            is_same = (other.task, other.protected, other.seed) == (model.task, model.protected, model.seed)
            same = other.stage.component == model.stage.component and other.stage.parameters == model.stage.parameters
            if is_same and same and CHOSEN not in other.stage.inputs:
                found[model.task, model.defense] = other.defense
    return found


def _beside_default(
    run: MeasuredRun,
    probes: Sequence[Mapping[str, Any]],
    counts: Mapping[tuple[str, str], int],
    defaults: Mapping[tuple[str, str], str],
) -> list[dict[str, Any]]:
    """Return the lines of tuned.csv, in the order of the leaderboard."""
    names = ("task", "attack", "attacker", "metric", "step")
    by_name = {(*(line[name] for name in names), line["defense"]): line for line in run.leaderboard}
    lines = []
    for line in run.leaderboard:
        about = (line["task"], line["defense"])
        if about not in counts:
            continue
        own = [probe for probe in probes if (probe["task"], probe["defense"]) == about]
        default = by_name.get((*(line[name] for name in names), defaults.get(about, "")))
        made = {name: line[name] for name in names} | {
            "defense": line["defense"],
            "default": default["defense"] if default else "",
            "tuning_probes": counts[about],
            "searches": len({probe["search_seeds"] for probe in own}),
            "search_passes": sum(probe["probe_passes"] for probe in own),
            "search_seconds": round(sum(probe["probe_seconds"] for probe in own), 4),
        }
        for column in _COMPARED:
            made |= {column: line[column], f"{column}_default": default[column] if default else None}
        lines.append(made)
    return lines


def _probe_section(lines: Sequence[Mapping[str, Any]]) -> Section:
    """Return the probes for people."""
    headers = (
        "task", "defense", "seeds", "probe", "setting", "result", "immunity", "utility", "UNet passes",
    )  # fmt: skip
    rows = [
        (
            line["task"],
            line["defense"],
            line["search_seeds"],
            f"{line['probe']}{' (repeat)' if line['is_repeat'] else ''}",
            _STATED if line["tried_setting"] == "{}" else line["tried_setting"],
            _result(line),
            _number(line["tuning_immunity"]),
            _number(line["tuning_utility"]),
            f"{line['probe_passes']:,.0f}",
        )
        for line in lines
    ]
    text = (
        "Settings tried on the tuning concepts, which no table measures. Chosen is the setting of the highest immunity "
        "among those that keep the floor of the utility by every metric, if it is better than the stated one in every "
        "repeat too.",
    )
    return Section("Probes of tuned defenses", text, headers, rows, "llllllrrr")


def _tuned_section(lines: Sequence[Mapping[str, Any]]) -> Section:
    """Return default and tuned side by side for people."""
    headers = (
        "task", "attack", "metric", "step", "defense", "probes", "UNet passes of the searches", "SGR %", "default",
        "recovery", "default", "utility", "default",
    )  # fmt: skip
    rows = [
        (
            line["task"],
            line["attack"],
            line["metric"],
            str(line["step"]),
            line["defense"],
            f"{line['tuning_probes']} x {line['searches']}",
            f"{line['search_passes']:,.0f}",
            _percent(line["sgr"]),
            _percent(line["sgr_default"]),
            *(_number(line[f"{column}{end}"]) for column in ("recovery", "utility") for end in ("", "_default")),
        )
        for line in lines
    ]
    text = (
        "Each tuned defense beside the same defense as it is stated (default), on concepts that no search saw. "
        "Whether they differ is what `compare` says; the cost of the searches is not in the default.",
    )
    return Section("Default and tuned", text, headers, rows, "lllllrrrrrrrr")


def _result(line: Mapping[str, Any]) -> str:
    if line["void"]:
        return line["void"]
    return ", ".join(
        ["passes" if line["passes_floor"] else "below the floor", *(["chosen"] if line["is_chosen"] else [])]
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}"
