"""Figures of bounds: the ratio and the multiplier round by round, and utility and SGR over the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.results.looks import looks

_GREY = "#777777"


def draw_trajectories(lines: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw `path` (PNG), a row per task: smoothed ratio (left) and multiplier (right) over rounds; False without lines.

    A line is a defense, mean over trainings; dashed: its bound.
    """
    if not lines:
        return False
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line["task"] for line in lines))
    found = looks(line["defense"] for line in lines)
    figure = Figure(figsize=(10, 0.8 + 2.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False, sharex="row")
    for (left, right), task in zip(axes, tasks, strict=True):
        for name, look in found.items():
            own = [line for line in lines if (line["task"], line["defense"]) == (task, name)]
            if not own:
                continue
            left.axhline(own[0]["bound"], color=look.colour, lw=0.7, ls="--")
            for axis, column in ((left, "smoothed_ratio"), (right, "multiplier")):
                label = name if axis is left and task == tasks[0] else None
                axis.plot(*_means(own, "round", column), color=look.colour, ls=look.line, lw=1.2, label=label)
        left.set_ylabel(f"{task}:\nloss on what must stay / start", fontsize=8)
        right.set_ylabel("multiplier", fontsize=8)
    for axis in axes.flat:
        _plain(axis)
    for axis in axes[-1]:
        axis.set_xlabel("round", fontsize=8)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def draw_knob(lines: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw `path` (PNG), a row per task, family and metric; return False without lines.

    Left: utility over the bound. Right: SGR over the bound at the last step, a line per attack; black: the worst case.
    Horizontal, dotted: the same defense without a bound.
    """
    if not lines:
        return False
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys((line["task"], line["family"], line["metric"]) for line in lines))
    figure = Figure(figsize=(10, 0.8 + 2.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False, sharex="row")
    attacks = list(dict.fromkeys(_attack(line) for line in lines if not line["is_worst"]))
    found = looks(attacks)
    for (left, right), row in zip(axes, rows, strict=True):
        own = [line for line in lines if (line["task"], line["family"], line["metric"]) == row]
        last = max(line["step"] for line in own)
        own = [line for line in own if line["step"] == last]
        _over_bound(left, [line for line in own if not line["is_worst"]], "utility", "#000000", "o")
        for attack, look in found.items():
            of = [line for line in own if not line["is_worst"] and _attack(line) == attack]
            _over_bound(right, of, "sgr", look.colour, look.mark, attack if row == rows[0] else None)
        worst = [line for line in own if line["is_worst"]]
        _over_bound(right, worst, "sgr", "#000000", "o", "worst case" if row == rows[0] else None)
        left.set_ylabel("\n".join(row), fontsize=8)
        left.set_title("utility before any attack", fontsize=8)
        right.set_title(f"SGR, step {last}", fontsize=8)
    for axis in axes.flat:
        _plain(axis)
        axis.set_xlabel("bound", fontsize=8)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def _over_bound(axis: Any, lines, column: str, colour: str, mark: str, label: str | None = None) -> None:
    known = [line for line in lines if line[column] is not None]
    bounded = [line for line in known if line["bound"] is not None]
    if bounded:
        axis.plot(*_means(bounded, "bound", column), marker=mark, ms=4, color=colour, lw=1.2, label=label)
    free = [line[column] for line in known if line["bound"] is None]
    if free:
        axis.axhline(sum(free) / len(free), color=colour, lw=0.9, ls=":")
    axis.axhline(0, color=_GREY, lw=0.5)


def _attack(line: Mapping[str, Any]) -> str:
    return f"{line['attack']}, adaptive" if line["attacker"] == "adaptive" else line["attack"]


def _means(lines: Sequence[Mapping[str, Any]], over: str, column: str) -> tuple[list[float], list[float]]:
    """Return (values of `over`, mean of a column at each), in ascending order."""
    grouped: dict[float, list[float]] = {}
    for line in lines:
        grouped.setdefault(line[over], []).append(line[column])
    places = sorted(grouped)
    return places, [sum(grouped[place]) / len(grouped[place]) for place in places]


def _plain(axis: Any) -> None:
    axis.grid(axis="y", color="#eeeeee", lw=0.5)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
