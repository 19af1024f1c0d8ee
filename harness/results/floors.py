"""The worst case over the utility floor: which defenses still count if a released model must keep so much utility.

A table and a panel for each task and metric, at the step of its headline. Both are made from `Claims.by_floor` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.table import Section
from harness.results.headline import rank_text
from harness.results.looks import Look, looks

if TYPE_CHECKING:
    from harness.analysis.claims import Claims

Line = Mapping[str, Any]
LEGEND = (
    "SGR % of the worst case over attacks, with the rank in brackets, where a released model must keep at least this "
    "share of the undefended model's utility by every metric. A dash: it keeps less, or does not count for another "
    "reason. Ranks are of the defenses that count at the floor; tie: chance explains the order. All steps are in "
    "worst_case_by_floor.csv."
)
NOTE = "#777777"
"""The colour of words in a panel, on a light and on a dark page."""
TITLE = "Worst case over attacks, by utility floor"


def shown(claims: Claims) -> dict[tuple[str, str, int], list[Line]]:
    """Return (task, metric, step) -> the lines by floor of each headline; headlines without a worst case have none."""
    found: dict[tuple[str, str, int], list[Line]] = {(h.task, h.metric, h.step): [] for h in claims.headlines}
    for line in claims.by_floor:
        place = line["task"], line["metric"], line["step"]
        if place in found:
            found[place].append(line)
    return {place: lines for place, lines in found.items() if lines}


def table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return (headers, rows) of one task, metric and step: a row for each defense, a column for each floor."""
    floors = sorted({line["floor"] for line in lines})
    known = {(line["defense"], line["floor"]): line for line in lines}
    defenses = list(dict.fromkeys(line["defense"] for line in lines))
    rows = [[name, *(_cell(known[name, floor]) for floor in floors)] for name in defenses]
    return ["defense", *(f"{100 * floor:.0f} %" for floor in floors)], rows


def _cell(line: Line) -> str:
    if not line["valid"] or line["sgr"] is None:
        return "–"
    rank = "" if line["rank_low"] is None else f" ({rank_text(line)})"
    return f"{100 * line['sgr']:+.1f}{rank}"


def sections(claims: Claims) -> list[Section]:
    """Return the part of leaderboard.md; [] without a worst case."""
    found = []
    for (task, metric, step), lines in shown(claims).items():
        headers, rows = table(lines)
        found.append(Section(f"{task} / {metric}, after step {step}", headers=tuple(headers), rows=rows, level=3))
    return [Section(TITLE, (LEGEND,)), *found] if found else []


def draw(claims: Claims, path: Path) -> bool:
    """Draw `path` (PNG): a panel for each task and metric; return False if there is nothing to draw."""
    panels = shown(claims)
    if not panels:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for task, _, _ in panels))
    metrics = list(dict.fromkeys(metric for _, metric, _ in panels))
    figure = Figure(figsize=(max(5.0, 3.2 * len(metrics)), 2.8 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(metrics), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    own = looks(dict.fromkeys(line["defense"] for lines in panels.values() for line in lines))
    handles: dict[str, Any] = {}
    for (task, metric, step), lines in panels.items():
        axis = axes[tasks.index(task)][metrics.index(metric)]
        axis.set_axis_on()
        panel(axis, lines, own)
        axis.set_title(f"{task}: {metric}, step {step}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", color="#dddddd", lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        drawn, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    for row in axes:
        row[0].set_ylabel("SGR in the worst case, %", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("utility that must be kept, %", fontsize=8)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(6, max(1, len(handles))),
        fontsize=8, frameon=False,
    )  # fmt: skip
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(path)
    return True


def panel(axis, lines: Sequence[Line], own: Mapping[str, Look]) -> None:
    """Draw a line for each defense over the floors at which it counts; at its end, the 95 % interval.

    Where none counts at any floor, the panel says so.
    """
    by_defense: dict[str, list[Line]] = {}
    for line in lines:
        if line["valid"] and line["sgr"] is not None:
            by_defense.setdefault(line["defense"], []).append(line)
    floors = sorted({line["floor"] for line in lines})
    for name, counted in by_defense.items():
        look, ordered = own[name], sorted(counted, key=lambda line: line["floor"])
        where, heights = [100 * line["floor"] for line in ordered], [100 * line["sgr"] for line in ordered]
        axis.plot(where, heights, look.line, color=look.colour, lw=1.6, label=name)
        last = ordered[-1]
        if last["sgr_low"] is None:
            axis.plot(where[-1:], heights[-1:], look.mark, color=look.colour, ms=5)
            continue
        reach = [[heights[-1] - 100 * last["sgr_low"]], [100 * last["sgr_high"] - heights[-1]]]
        axis.errorbar(where[-1:], heights[-1:], reach, fmt=look.mark, color=look.colour, ms=5, lw=1, capsize=2)
    if not by_defense:
        axis.text(0.5, 0.5, "no defense counts", transform=axis.transAxes, ha="center", fontsize=8, color=NOTE)
    axis.set_xlim(100 * floors[0] - 2, 100 * floors[-1] + 2)
