"""Figures of the report as SVG files that follow the reader's colour scheme.

Matplotlib draws them in placeholder colours, which are then replaced by CSS variables in the file. An image in a page
follows `prefers-color-scheme` by itself, so light mode, dark mode and print work without a script.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.report.views import ConceptCurves, CurvePoint, Interval, Plane
from harness.results.floors import panel
from harness.results.looks import COLOURS, Look, looks

DARK = (
    "#f2f2f2", "#4aa8e0", "#ff8a3d", "#2fc79a", "#e39ac6", "#f0b429", "#8fd0f5", "#f5e96b",
    "#d477a8", "#c9c95a", "#9a8cf0", "#7fd9c8", "#f29aa9", "#5fbf7f", "#dd8ad0", "#b5b5b5",
)  # fmt: skip
"""The same palette, lighter for a dark background."""
INK, FAINT, GRID = "#010101", "#010102", "#010103"
"""Placeholder colours, not used by any line."""
_INKS = {INK: ("#1c1c1c", "#e8e8e8"), FAINT: ("#6b6b6b", "#a0a0a0"), GRID: ("#dddddd", "#3a3a3a")}
_STAND_INS = tuple(f"#0102{index:02x}" for index in range(len(COLOURS)))
PANELS_A_ROW = 4
BOTTOM_IN = 1.0
"""Space below the panels: axis labels, and three legend lines."""
MARKERS = "osD^vP*X<>hd"


def palette(defenses: Sequence[str]) -> dict[str, Look]:
    """Return each defense's look, in placeholder colours."""
    return looks(defenses, _STAND_INS)


def recovery(path: Path, curves: ConceptCurves, own: Mapping[str, Look]) -> None:
    """Draw a panel for each attack: scores by step, one line per defense; whiskers: 95 % interval over seeds."""
    attacks = list(curves.attacks)
    per_row = min(PANELS_A_ROW, len(attacks))
    rows = -(-len(attacks) // per_row)
    figure, axes = _figure(rows, per_row, 2.5, 1.75)
    handles: dict[str, Any] = {}
    for place, axis in enumerate(axes.flat):
        if place >= len(attacks):
            axis.set_axis_off()
            continue
        _panel(axis, curves, curves.attacks[attacks[place]], own)
        axis.set_title(attacks[place], fontsize=9, color=INK)
        if place + per_row >= len(attacks):
            axis.set_xlabel("attack step", fontsize=8, color=INK)
        drawn, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    for line in axes:
        line[0].set_ylabel(curves.metric, fontsize=8, color=INK)
    _legend(figure, handles)
    _save(figure, path)


def _panel(axis, curves: ConceptCurves, by_defense: Mapping[str, Sequence[CurvePoint]], own) -> None:
    steps = sorted({p.step for points in by_defense.values() for p in points})
    places = {step: index for index, step in enumerate(steps)}
    apart = min(0.06, 0.7 / len(by_defense))  # whiskers side by side, within the space of their step
    for index, (defense, points) in enumerate(by_defense.items()):
        aside = apart * (index - (len(by_defense) - 1) / 2)
        where, means = [places[p.step] + aside for p in points], [p.mean for p in points]
        look = own[defense]
        axis.plot(where, means, look.line, color=look.colour, label=defense, lw=1.5, marker=look.mark, ms=3)
        known = [(x, p) for x, p in zip(where, points, strict=True) if p.low is not None]
        if known:
            low, high = [p.mean - p.low for _, p in known], [p.high - p.mean for _, p in known]
            axis.errorbar(
                [x for x, _ in known], [p.mean for _, p in known], [low, high], fmt="none", ecolor=look.colour,
                elinewidth=0.8, alpha=0.55, capsize=1.5,
            )  # fmt: skip
    for value, style, label in ((curves.real, "--", "real images"), (curves.original, ":", "before erasure")):
        if value is not None:
            axis.axhline(value, color=FAINT, ls=style, lw=1, label=label)
    axis.set_xticks(list(places.values()), [str(step) for step in steps])
    _plain(axis)


def floors(path: Path, lines: Sequence[Mapping[str, Any]], own: Mapping[str, Look]) -> None:
    """Draw SGR in the worst case over the utility floor, of one task, metric and step: `harness.results.floors`."""
    figure, axes = _figure(1, 1, 5.0, 2.6)
    axis = axes[0][0]
    panel(axis, lines, own)
    axis.set_title(f"{lines[0]['metric']}, after step {lines[0]['step']}", fontsize=9, color=INK)
    axis.set_xlabel("utility that must be kept, %", fontsize=8, color=INK)
    axis.set_ylabel("SGR in the worst case, %", fontsize=8, color=INK)
    _plain(axis)
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        _legend(figure, dict(zip(labels, handles, strict=True)))
    _save(figure, path)


def plane(path: Path, shown: Plane, own: Mapping[str, Look]) -> None:
    """Draw immunity over retention, with 95 % intervals: a colour per defense; small: attacks; large: worst case.

    Hollow markers do not count. A star is drawn around a defense that is on the front beyond chance; two or more are
    joined.
    """
    figure, axes = _figure(1, 1, 5.0, 3.6)
    axis = axes[0][0]
    attacks = list(dict.fromkeys(p.attack for p in shown.points if p.attack))
    has_worst = any(not p.attack for p in shown.points)
    for point in shown.points:
        is_worst = not point.attack
        is_large = is_worst or not has_worst
        look = own[point.defense]
        marker = look.mark if is_large else MARKERS[attacks.index(point.attack) % len(MARKERS)]
        face = look.colour if point.valid else "none"
        size, alpha = (90, 1.0) if is_large else (22, 0.6)
        x, y = 100 * point.retention.value, 100 * point.immunity.value
        if is_large:  # those of single attacks would hide them; they are in the leaderboard
            axis.errorbar(
                [x], [y], xerr=_reach(point.retention), yerr=_reach(point.immunity), fmt="none", ecolor=look.colour,
                elinewidth=0.9, alpha=0.55, capsize=2.5, zorder=1,
            )  # fmt: skip
        axis.scatter(
            x, y, s=size, marker=marker, facecolors=face, edgecolors=look.colour, linewidths=1.2, alpha=alpha,
            zorder=3 if is_worst else 2,
        )  # fmt: skip
    whole = {p.defense: p for p in shown.points if p.defense in shown.front and not (has_worst and p.attack)}
    ordered = sorted(whole.values(), key=lambda p: p.retention.value)
    if ordered:
        places = [100 * p.retention.value for p in ordered], [100 * p.immunity.value for p in ordered]
        label = "on the front beyond chance"
        axis.scatter(*places, s=240, marker="*", facecolors="none", edgecolors=INK, zorder=4, label=label)
        if len(ordered) > 1:
            axis.step(*places, where="pre", color=FAINT, lw=1, ls="--", zorder=1)
    for defense in dict.fromkeys(p.defense for p in shown.points):
        axis.scatter([], [], color=own[defense].colour, marker=own[defense].mark, s=40, label=defense)
    for attack in attacks if has_worst else ():
        marker = MARKERS[attacks.index(attack) % len(MARKERS)]
        axis.scatter([], [], color=FAINT, marker=marker, s=22, label=attack)
    axis.set_title(f"{shown.metric}, after step {shown.step}", fontsize=9, color=INK)
    axis.axvline(100, color=FAINT, lw=0.7)
    axis.axhline(0, color=FAINT, lw=0.7)
    axis.set_xlabel("retention: what innocents keep, %", fontsize=8, color=INK)
    axis.set_ylabel("immunity: SGR on targets, %", fontsize=8, color=INK)
    _plain(axis)
    handles, labels = axis.get_legend_handles_labels()
    _legend(figure, dict(zip(labels, handles, strict=True)))
    _save(figure, path)


def _reach(of: Interval) -> list[list[float]] | None:
    """Return an interval's error bar in percent, from the value downwards and upwards; None: there is no interval."""
    if of.low is None or of.high is None:
        return None
    return [[100 * (of.value - of.low)], [100 * (of.high - of.value)]]


def _figure(rows: int, per_row: int, width_in: float, height_in: float):
    """Return a figure with panels of that size at fixed positions, since layout engines draw everything twice."""
    from matplotlib.figure import Figure

    left, right, top, bottom, between = 0.6, 0.1, 0.3, BOTTOM_IN, (0.15, 0.6)
    width = left + right + per_row * width_in + (per_row - 1) * between[0]
    height = top + bottom + rows * height_in + (rows - 1) * between[1]
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(
        rows, per_row, squeeze=False, sharey=True,
        gridspec_kw={
            "left": left / width, "right": 1 - right / width, "top": 1 - top / height, "bottom": bottom / height,
            "wspace": between[0] / width_in, "hspace": between[1] / height_in,
        },
    )  # fmt: skip
    return figure, axes


def _plain(axis) -> None:
    axis.tick_params(labelsize=7, colors=INK)
    axis.grid(axis="y", color=GRID, lw=0.5)
    axis.set_axisbelow(True)
    axis.set_facecolor("none")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)


def _legend(figure, handles: Mapping[str, Any]) -> None:
    """Add a legend below the panels; if it has too many lines, make the figure higher."""
    widest = max(len(label) for label in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.5 + 0.075 * widest))))
    lines = -(-len(handles) // columns)
    missing = 0.48 + 0.18 * lines - BOTTOM_IN  # axis labels, and a line of the legend
    if missing > 0:
        height, grid = figure.get_figheight(), figure.axes[0].get_gridspec()  # measured from the grid's positions
        figure.set_figheight(height + missing)
        grid.update(
            bottom=(grid.bottom * height + missing) / (height + missing),
            top=(grid.top * height + missing) / (height + missing),
        )
        for axis in figure.axes:  # matplotlib does this only for pyplot's figures
            axis.set_position(axis.get_subplotspec().get_position(figure))
    figure.legend(
        list(handles.values()), list(handles), loc="lower center", ncols=columns, fontsize=8, frameon=False,
        labelcolor=INK, borderaxespad=0.1,
    )  # fmt: skip


def _save(figure, path: Path) -> None:
    """Write a figure; the same figure gives the same bytes."""
    import matplotlib

    text = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "immunitybench", "text.parse_math": False}
    with matplotlib.rc_context(settings | {"font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    path.write_text(themed(text.getvalue()), encoding="utf-8")


def themed(svg: str) -> str:
    """Return an SVG with the placeholders replaced by variables that have a light and a dark value."""
    pairs = dict(_INKS) | dict(zip(_STAND_INS, zip(COLOURS, DARK, strict=True), strict=True))
    names = {stand_in: f"--c{index}" for index, stand_in in enumerate(pairs)}
    light = ";".join(f"{names[s]}:{values[0]}" for s, values in pairs.items())
    dark = ";".join(f"{names[s]}:{values[1]}" for s, values in pairs.items())
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme: dark){{svg{{{dark}}}}}</style>"
    found = re.compile("|".join(map(re.escape, pairs)))
    svg = found.sub(lambda match: f"var({names[match[0]]})", svg)
    return re.sub(r"(<svg\b[^>]*>)", lambda match: match[1] + style, svg, count=1)
