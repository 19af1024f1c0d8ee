"""Figure of learned against random masks by frozen share: agreement of seeds, and protection beyond random."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.results.looks import looks as defense_looks

MARKERS = "osD^vP*X"
_GREY = "#777777"


def draw(overlaps: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw `path` (PNG) from the lines of masks.csv and masks_against_random.csv; return False without lines."""
    figure = plot(overlaps, against)
    if figure is None:
        return False
    figure.savefig(path, dpi=150)
    return True


def plot(overlaps: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]]) -> Any:
    """Return the figure; None without lines.

    One row per task and attack, at its last step; the horizontal axis is the share of frozen tensors. Panels: how much
    of a mask follows from its start without data (1: all); the overlap of two seeds' masks minus that of random sets;
    and for each metric how much less the attack reaches than on random masks of similar size (whiskers: 95 %
    intervals). Zero: no better than random. Hollow: a corrected test finds no difference from random.
    """
    singles = [line for line in against if not line["is_together"]]
    if not singles:
        return None
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = list(dict.fromkeys((line["task"], line["attack"]) for line in singles))
    metrics = list(dict.fromkeys(line["metric"] for line in singles))
    names = list(dict.fromkeys(line["family"] for line in singles))
    looks = {
        name: {"color": look.colour, "marker": MARKERS[i % len(MARKERS)]}
        for i, (name, look) in enumerate(defense_looks(names).items())
    }
    width = 2 + len(metrics)
    figure = Figure(figsize=(2.5 * width, 0.8 + 2.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False, sharex=True)
    agreeing = _agreeing(overlaps)
    for place, (task, attack) in enumerate(rows):
        own = [line for line in singles if (line["task"], line["attack"]) == (task, attack)]
        last = max(line["step"] for line in own)
        own = [line for line in own if line["step"] == last]
        by_defense = {line["defense"]: line for line in own}
        alike, agree, *gaps = axes[place]
        _overlap(alike, overlaps, by_defense, looks, lambda mask: mask["overlap_without_data"], None)
        alike.set_ylim(-0.05, 1.05)
        alike.set_ylabel(f"{task}:\noverlap", fontsize=8)
        _overlap(agree, overlaps, by_defense, looks, _beyond_chance, agreeing)
        agree.set_ylabel("overlap beyond chance", fontsize=8)
        for axis, metric in zip(gaps, metrics, strict=True):
            _gap(axis, [line for line in own if line["metric"] == metric], looks)
            axis.set_title(f"{attack}, step {last}:\n{metric}", fontsize=8)
        gaps[0].set_ylabel("protects more than random by", fontsize=8)
    axes[0][0].set_title("with the mask\nthat no data gives", fontsize=8)
    axes[0][1].set_title("do masks of\ntwo seeds agree?", fontsize=8)
    for axis in axes.flat:
        axis.axhline(0, color=_GREY, lw=0.8)
        axis.grid(axis="y", color="#eeeeee", lw=0.5)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("frozen tensors, %", fontsize=8)
    handles = [Line2D([], [], ls="", ms=5, label=name, **look) for name, look in looks.items()]
    unclear = {"marker": "o", "mfc": "none", "color": _GREY, "label": "not told apart from random (corrected)"}
    handles.append(Line2D([], [], ls="", ms=5, **unclear))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _agreeing(overlaps: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """Return (task, defense) of masks whose seeds agree in every protected set; Holm-corrected over all but random."""
    from harness.analysis.compare import LEVEL
    from harness.analysis.statistics import holm

    tested = {
        (mask["task"], mask["defense"], mask["protected"]): mask["overlap_p"]
        for mask in overlaps
        if mask["method"] != "random_freeze"
    }
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    by_defense: dict[tuple[str, str], list[float | None]] = {}
    for (task, defense, _), p in corrected.items():
        by_defense.setdefault((task, defense), []).append(p)
    return {name for name, own in by_defense.items() if all(p is not None and p < LEVEL for p in own)}


def _beyond_chance(mask: Mapping[str, Any]) -> float | None:
    return None if mask["overlap_of_seeds"] is None else mask["overlap_of_seeds"] - mask["overlap_by_chance"]


def _overlap(
    axis: Any,
    overlaps: Sequence[Mapping[str, Any]],
    by_defense: Mapping[str, Mapping],
    looks,
    number_of: Callable[[Mapping[str, Any]], float | None],
    filled: Collection[tuple[str, str]] | None,
) -> None:
    """Draw a point for each defense: the mean of `number_of` over its masks. `filled` None: all points are filled."""
    for defense, line in by_defense.items():
        own = [m for m in overlaps if (m["task"], m["defense"]) == (line["task"], defense)]
        values = [value for value in map(number_of, own) if value is not None]
        if values:
            look = looks[line["family"]]
            face = look["color"] if filled is None or (line["task"], defense) in filled else "white"
            axis.plot(100 * line["frozen"], sum(values) / len(values), ms=5, ls="", mfc=face, **look)


def _gap(axis: Any, lines: Sequence[Mapping[str, Any]], looks) -> None:
    for line in lines:
        look, x, value = looks[line["family"]], 100 * line["frozen"], line["stronger_by"]
        if line["low"] is not None:
            axis.plot([x, x], [line["low"], line["high"]], color=look["color"], lw=0.9, alpha=0.6)
        face = look["color"] if line["verdict"] in ("stronger", "weaker") else "white"
        axis.plot(x, value, ms=5, ls="", mfc=face, **look)
