"""Results of attacks on frozen models, in the form of FreezeAsGuard's tables 2, 3 and 4. No torch here.

    by ratio      per defense of a task: the attacks' scores on the targets after their last step, and an honest user's
                  scores on the innocent concepts; honest and adaptive attackers separately (table 2)
    cost          the cost that freezing saves an honest user (table 3, from `harness.results.adaptation_cost`)
    by concepts   defenses used in several tasks, side by side, ordered by the number of concepts protected together
                  (table 4)

If a paper's numbers are requested, they are in additional columns, as printed: in freezing.md, and in freezing.csv and
adaptation_cost.csv (`beside_paper`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from defenses.freezing.masks import Mask
from harness.contracts.table import Section

if TYPE_CHECKING:
    from harness.analysis.measurements import Measurements
    from harness.analysis.paper_rows import PaperRow

Name = tuple[str, int | None]
"""A paper's name of a defense, and its ratio in %."""
Names = Mapping[tuple[str, str], Name]
"""(task, defense) -> its name in the paper."""
Line = Mapping[str, Any]
Printed = Mapping[tuple, str]
"""A paper's printed numbers, by table, name, setting and metric."""
PaperCell = tuple[str, str, str]
"""A paper's table, setting and metric."""
PAPER = "freezeasguard"
"""The name of the paper's rows."""
METHODS = ("freezeasguard", "random_freeze", "freeze_component")
"""Freezing methods that are in papers."""
COLUMNS = (
    "task", "n_protected", "n_targets", "metric", "unit", "step", "attack", "attacker", "defense", "method", "profile",
    "ratio", "frozen", "parameters", "target_original", "target_none", "target_defended", "sgr", "sgr_low", "sgr_high",
    "innocent_none", "innocent_defended", "innocent_sgr", "utility", "valid", "is_felt",
)  # fmt: skip
"""Columns of freezing.csv: the leaderboard's, with the requested ratio and the frozen shares."""
_GROUPS = {
    "2 subjects, seed 1": "2 subjects of FF25, seed 1",
    "2 subjects, seed 2": "2 subjects of FF25, seed 2",
    "5 subjects": "5 subjects of FF25",
    "10 subjects": "10 subjects of FF25",
}
"""Of the paper's table 4: names of columns, and how its rows name the subjects."""


def _of_group(group: str) -> tuple[PaperCell, PaperCell]:
    """Return the cells of table 4 with FID on the illegal domain and CLIP on the innocent one."""
    return (
        ("4", f"illegal domain, {_GROUPS[group]}", "FID"),
        ("4", f"innocent domain, Logo; illegal: {group}", "CLIP"),
    )


_OF_TABLE_2 = (
    ("2", "illegal domain, 10 subjects of FF25", "FID"),
    ("2", "innocent domain, Logo; 10 illegal subjects", "CLIP"),
)
_MEASURES = ("fid", "logo_clip")
PAPER_COLUMNS: dict[str, PaperCell] = {
    **{f"paper_table_2_{name}": cell for name, cell in zip(_MEASURES, _OF_TABLE_2, strict=True)},
    **{
        f"paper_table_4_{re.sub('[ ,]+', '_', group)}_{name}": cell
        for group in _GROUPS
        for name, cell in zip(_MEASURES, _of_group(group), strict=True)
    },
}
"""Columns added to freezing.csv with the paper's numbers of the line's defense."""
PAPER_COST_COLUMNS: dict[str, PaperCell] = {
    "paper_gpu_memory_gb": ("3", "user's fine-tuning", "GPU memory"),
    "paper_seconds_per_batch": ("3", "user's fine-tuning", "time per batch"),
}
"""Columns added to adaptation_cost.csv, at FreezeAsGuard's ratio; the paper's 0 % is the undefended model."""
LEGEND = (
    "reaches: similarity of what the attacked model draws to the targets, mean over targets and seeds. SGR: "
    "(undefended - defended) / undefended, with its 95 % interval over seeds; as none: this attacker feels nothing of "
    "the defense, and what it draws is the undefended model's. innocents: what the same adaptation makes of innocent "
    "concepts. counts: no where a line is not valid; leaderboard.md says why."
)
COST_LEGEND = (
    "Shares are of the undefended model's. Peak memory is a GPU's; shares of the time are told where stages had their "
    "device to themselves. tests/benchmarks/freezing_saves.py measures both on a CPU."
)
PAPER_LEGEND = (
    "Paper: FreezeAsGuard v1 (arXiv 2405.17472) as printed: SD v1.5, full fine-tuning, FID of portraits (higher: "
    "stronger mitigation), CLIP score of logos. Its IMMA stands beside `joint`; its UCE beside `none` where a task "
    "erases, as the released pipeline does before it freezes, and its Full FT, which was not erased, where it does "
    "not. Masks that are in no paper have none of its numbers."
)
_AS_PRINTED = {"normalise": "none", "binarise": "threshold", "of": "tensors"}
"""Parameter values of the paper's masks, for methods that have these parameters."""
_RHO = re.compile(r"; rho (\d+) %")


def lines(
    leaders: Sequence[Line], masks: Sequence[Mask], together: Mapping[str, int], table: Measurements
) -> list[dict[str, Any]]:
    """Return the lines of freezing.csv, in the leaderboard's order.

    `together`: the number of concepts protected together, by task; `table`: the measurements behind the leaderboard.
    """
    by_defense: dict[tuple[str, str], list[Mask]] = {}
    for mask in masks:
        by_defense.setdefault((mask.task, mask.defense), []).append(mask)
    found = []
    for leader in leaders:
        own = by_defense.get((leader["task"], leader["defense"]), [])
        values = {
            **leader,
            "n_protected": together[leader["task"]],
            "ratio": own[0].ratio if own else None,
            "frozen": sum(mask.share for mask in own) / len(own) if own else 0.0,
            "parameters": sum(mask.share_of_parameters for mask in own) / len(own) if own else 0.0,
            "is_felt": not _is_undefended(leader, table),
        }
        found.append({column: values[column] for column in COLUMNS})
    return found


def _is_undefended(leader: Line, table: Measurements) -> bool:
    none = table.undefended[leader["task"]]
    attack = (leader["task"], leader["attack"], leader["attacker"])
    return none is not None and table.shares_images(*attack, leader["defense"], none)


def paper_names(
    found: Sequence[Line], masks: Sequence[Mask], erasing: Collection[str]
) -> dict[tuple[str, str], Name]:
    """Return (task, defense) -> its name in the paper; defenses that are in no paper are left out.

    `erasing` are the tasks that erase their concepts first.
    """
    names: dict[tuple[str, str], Name] = {}
    for line in found:
        is_erased = line["task"] in erasing
        name = {"none": "uce" if is_erased else "none", "joint": "imma", "uce": "" if is_erased else "uce"}
        if name.get(line["method"]):
            names[line["task"], line["defense"]] = (name[line["method"]], None)
    for mask in masks:
        percent = 0 if mask.ratio is None else round(100 * mask.ratio)
        as_printed = mask.given == "all" and all(
            mask.parameters.get(name, value) == value for name, value in _AS_PRINTED.items()
        )
        if mask.method in METHODS and as_printed and percent and math.isclose(100 * mask.ratio, percent):
            names[mask.task, mask.defense] = (mask.method, percent)
    return names


def beside_paper(
    found: Sequence[Line], papers: Sequence[PaperRow], names: Names
) -> list[dict[str, Any]]:
    """Return the lines of freezing.csv with `PAPER_COLUMNS`: the defense's numbers as printed."""
    printed = _by_cell(papers)
    found_beside = []
    for line in found:
        name = names.get((line["task"], line["defense"]))
        found_beside.append({**line, **{c: _printed(printed, name, cell) for c, cell in PAPER_COLUMNS.items()}})
    return found_beside


def costs_beside_paper(
    costs: Sequence[Line],
    found: Sequence[Line],
    papers: Sequence[PaperRow],
    names: Names,
) -> list[dict[str, Any]]:
    """Return the lines of adaptation_cost.csv with `PAPER_COST_COLUMNS`, for attacks that masks affect."""
    printed, affected = _by_cell(papers), _affected(found)
    methods = {(line["task"], line["defense"]): line["method"] for line in found}
    found_beside = []
    for cost in costs:
        name = _name_of_cost(cost, methods.get((cost["task"], cost["defense"]), ""), names)
        name = name if (cost["task"], cost["attack"]) in affected else None
        found_beside.append({**cost, **{c: _printed(printed, name, cell) for c, cell in PAPER_COST_COLUMNS.items()}})
    return found_beside


def _affected(found: Sequence[Line]) -> set[tuple[str, str]]:
    """Return (task, attack) of the attacks that a mask affects: honest, and training tensors that it freezes."""
    return {(line["task"], line["attack"]) for line in found if line["frozen"] and line["is_felt"]}


def _by_cell(papers: Sequence[PaperRow]) -> Printed:
    return {_key(row): row.printed for row in papers if row.paper == PAPER}


def _printed(printed: Printed, name: Name | None, cell: PaperCell) -> str | None:
    """Return the paper's number of a defense, as printed; None if there is none."""
    return None if name is None else printed.get((cell[0], *name, *cell[1:]))


def _name_of_cost(cost: Line, method: str, names: Names) -> Name | None:
    """Return the paper's name in its table 3, where 0 % is the undefended model."""
    return ("freezeasguard", 0) if method == "none" else names.get((cost["task"], cost["defense"]))


def sections(
    found: Sequence[Line],
    costs: Sequence[Line],
    order: Sequence[str],
    papers: Sequence[PaperRow] = (),
    names: Names = MappingProxyType({}),
    origin: str = "",
) -> list[Section]:
    """Return freezing.md; `order` are the names of the suite's defenses, `names` their names in the paper.

    `origin`: the sentence on how the tables' data were made.
    """
    printed = _by_cell(papers)
    paragraphs = (origin, LEGEND, PAPER_LEGEND if printed else "")
    made = [Section("Where tensors are frozen", tuple(filter(None, paragraphs)), level=1)]
    last = _at_last_step(found)
    metrics = list(dict.fromkeys(line["metric"] for line in last))
    for place, task in enumerate(dict.fromkeys(line["task"] for line in last)):
        for metric in metrics:
            own = [line for line in last if (line["task"], line["metric"]) == (task, metric)]
            # the paper's table has one task: shown with the suite's first task
            made += [_by_ratio(task, metric, own, order, {} if place else printed, names)] if own else []
    made += _cost(costs, found, printed, names)
    for metric in metrics:
        made += _by_concepts(metric, [line for line in last if line["metric"] == metric], order, printed, names)
    return made


def _at_last_step(found: Sequence[Line]) -> list[Line]:
    last: dict[tuple, int] = {}
    for line in found:
        name = (line["task"], line["attack"], line["attacker"])
        last[name] = max(line["step"], last.get(name, 0))
    return [line for line in found if line["step"] == last[line["task"], line["attack"], line["attacker"]]]


def _by_ratio(
    task: str, metric: str, own: Sequence[Line], order: Sequence[str], printed: Printed, names: Names
) -> Section:
    """Return the table of a task and metric: a row per defense, columns by attack."""
    attacks = list(dict.fromkeys((line["attack"], line["attacker"], line["step"]) for line in own))
    attacks.sort(key=lambda attack: attack[1] != "honest")  # stable
    head, rows = ["defense", "tensors %", "parameters %"], []
    for attack, attacker, step in attacks:
        who = f"{attack}, {attacker}, {step} steps"
        head += [f"{who}: reaches", "SGR % (95 %)", "counts"]
        if any(line["innocent_defended"] is not None for line in own if line["attack"] == attack):
            head.append("innocents")
    if printed:
        head += ["paper: illegal FID (10 subjects)", "paper: Logo CLIP"]
    for defense in sorted({line["defense"] for line in own}, key=order.index):
        of = {line["attack"]: line for line in own if line["defense"] == defense}
        any_line = next(iter(of.values()))
        cells = [defense, _percent(any_line["frozen"]), _percent(any_line["parameters"])]
        for attack, _, _ in attacks:
            line = of.get(attack, {})
            cells += [_number(line.get("target_defended")), _sgr(line), _counts(line)]
            if any(each["innocent_defended"] is not None for each in own if each["attack"] == attack):
                cells.append(_number(line.get("innocent_defended")))
        if printed:
            name = names.get((task, defense))
            cells += [_printed(printed, name, cell) or "–" for cell in _OF_TABLE_2]
        rows.append(cells)
    unit = own[0]["unit"]
    return Section(
        f"By ratio: {task}, {own[0]['n_protected']} concepts, {metric} ({unit})", headers=tuple(head), rows=rows
    )


def _cost(costs: Sequence[Line], found: Sequence[Line], printed: Printed, names: Names) -> list[Section]:
    """Return the tables of an honest user's adaptation costs, for attacks that the mask affects."""
    about, affected = {(line["task"], line["defense"]): line for line in found}, _affected(found)
    made: list[Section] = []
    groups: dict[tuple, list[Line]] = {}
    for cost in costs:
        if (cost["task"], cost["attack"]) in affected and (cost["task"], cost["defense"]) in about:
            groups.setdefault((cost["task"], cost["attack"]), []).append(cost)
    for (task, attack), own in groups.items():
        head = ["defense", "tensors %", "weights, MB", "optimizer, MB", "peak, MB", "s / step"]
        head += ["weights, share", "memory, share", "time, share"]
        rows = []
        for cost in own:
            line = about[task, cost["defense"]]
            sizes = [cost[name] for name in ("trained_bytes", "optimizer_bytes", "peak_memory_bytes")]
            cells = [cost["defense"], _percent(line["frozen"])]
            cells += ["–" if size is None else f"{size / 1e6:.1f}" for size in sizes]
            cells += [_number(cost["seconds_per_step"])]
            cells += [_number(cost[name], 2) for name in ("trained_ratio", "peak_memory_ratio", "time_ratio")]
            if printed:
                name = _name_of_cost(cost, line["method"], names)
                cells += [_printed(printed, name, cell) or "–" for cell in PAPER_COST_COLUMNS.values()]
            rows.append(cells)
        if printed:
            head += ["paper: GPU memory, GB", "paper: s / batch"]
        title = f"What it costs an honest user: {task}, {attack}"
        made.append(Section(title, (COST_LEGEND,), tuple(head), rows))
    return made


def _by_concepts(
    metric: str, own: Sequence[Line], order: Sequence[str], printed: Printed, names: Names
) -> list[Section]:
    """Return the table of the defenses that are used in several tasks; [] for one task."""
    sizes = {line["task"]: line["n_protected"] for line in own}
    tasks = sorted(sizes, key=sizes.__getitem__)  # stable
    made: dict[str, dict[str, dict[str, Line]]] = {}  # defense -> task -> attack -> line
    for line in own:
        made.setdefault(line["defense"], {}).setdefault(line["task"], {})[line["attack"]] = line
    shown = [defense for defense in sorted(made, key=order.index) if len(made[defense]) > 1]
    if not shown:
        return []
    head, columns = ["defense"], []
    for task in tasks:
        in_task = [line for line in own if line["task"] == task]
        attacks = dict.fromkeys((line["attack"], line["attacker"]) for line in in_task)
        for attack, attacker in sorted(attacks, key=lambda a: a[1] != "honest"):
            head.append(f"{task} ({sizes[task]} concepts): {attack}, {attacker}")
            columns.append((task, attack, "target_defended"))
        for attack in {line["attack"]: None for line in in_task if line["innocent_defended"] is not None}:
            head.append(f"innocents, {attack}")
            columns.append((task, attack, "innocent_defended"))
    groups = _GROUPS if printed else ()
    head += [f"paper: {group}: FID, CLIP" for group in groups]
    rows = []
    for defense in shown:
        of = made[defense]
        cells = [defense] + [_number(of.get(task, {}).get(attack, {}).get(value)) for task, attack, value in columns]
        name = next((names[task, defense] for task in of if (task, defense) in names), None)
        for group in groups:
            cells.append(", ".join(filter(None, (_printed(printed, name, cell) for cell in _of_group(group)))) or "–")
        rows.append(cells)
    unit = own[0]["unit"]
    title = f"By number of concepts: {metric} ({unit}), reached after the last step"
    return [Section(title, headers=tuple(head), rows=rows)]


def _key(row: PaperRow) -> tuple[str, str, int | None, str, str]:
    """Return (table, defense, ratio in %, setting without it, metric)."""
    ratio = _RHO.search(row.setting)
    return row.table, row.defense, int(ratio[1]) if ratio else None, _RHO.sub("", row.setting), row.metric


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _sgr(line: Line) -> str:
    if line.get("sgr") is None or line["method"] == "none":
        return "–"
    if not line["is_felt"]:
        return "as none"
    around = "" if line["sgr_low"] is None else f" ({100 * line['sgr_low']:.0f} to {100 * line['sgr_high']:.0f})"
    return f"{100 * line['sgr']:+.0f}{around}"


def _counts(line: Line) -> str:
    return "–" if not line else "yes" if line["valid"] else "no"
