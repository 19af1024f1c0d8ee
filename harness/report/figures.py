"""Recovery curves: similarity to the concept before, erased, and along each attack, for each defense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, told apart by readers who do not see all colours, and four of Tol's muted one after it
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442",
    "#882255", "#999933", "#332288", "#44AA99",
)  # fmt: skip


def recovery_curves(rows: Sequence[Mapping[str, Any]], path: Path, role: str = "target") -> bool:
    """Draw `path` (PNG); return False when there is nothing to draw.

    Panels: tasks by metrics; where there are several attacks, a row for each task and metric and a column an attack.
    Lines are means over concepts, prompts and seeds; dots are seeds. Step 0 is the released model before the attack.
    Dashed: real images of the attack split. Dotted: the model before erasure. Metrics without a direction are left out.
    """
    rows = [r for r in rows if r["direction"] != "none"]
    attacked = [r for r in rows if r["role"] == role and r["attack"]]
    if not attacked:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    attacks = list(dict.fromkeys(r["attack"] for r in attacked))
    defenses = list(dict.fromkeys((r["task"], r["defense"]) for r in attacked))
    colours = {defense: COLOURS[i % len(COLOURS)] for i, defense in enumerate(dict.fromkeys(d for _, d in defenses))}
    made = {(r["task"], r["metric"], r["attack"]) for r in attacked}
    lines, columns, panels = _grid(list(dict.fromkeys((r["task"], r["metric"]) for r in attacked)), attacks)
    figure, axes = pyplot.subplots(
        len(lines), len(columns), figsize=(max(5.0, 3.0 * len(columns)), 2.6 * len(lines)), squeeze=False,
        sharey="row" if len(attacks) > 1 else False, layout="constrained",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for (line, column), (task, metric, attack) in panels.items():
        axis = axes[line][column]
        if (task, metric, attack) not in made:
            axis.set_axis_off()
            continue
        mine = [r for r in rows if r["task"] == task and r["metric"] == metric and r["attack"] in ("", attack)]
        _panel(axis, mine, role, attack, colours)
        drawn, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
        axis.set_title(attack if len(attacks) > 1 else f"{task}: {metric}", fontsize=9)
    for line, label in zip(axes, lines, strict=True):
        line[0].set_ylabel(label, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("attack step", fontsize=8)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(2 * len(columns), len(handles)),
        fontsize=8, frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _grid(
    scales: Sequence[tuple[str, str]], attacks: Sequence[str]
) -> tuple[list[str], list[str], dict[tuple[int, int], tuple[str, str, str]]]:
    """Return (labels of lines, labels of columns, (line, column) -> (task, metric, attack)) of (task, metric) pairs."""
    if len(attacks) > 1:
        lines = [f"{task}\n{metric}" for task, metric in scales]
        panels = {(i, j): (*scale, attack) for i, scale in enumerate(scales) for j, attack in enumerate(attacks)}
        return lines, list(attacks), panels
    tasks, metrics = (list(dict.fromkeys(each)) for each in zip(*scales, strict=True))
    panels = {(tasks.index(task), metrics.index(metric)): (task, metric, attacks[0]) for task, metric in scales}
    return ["similarity to the references"] * len(tasks), metrics, panels


def _panel(axis, rows: Sequence[Mapping[str, Any]], role: str, attack: str, colours: Mapping[str, str]) -> None:
    """Draw one task, metric and attack."""
    attacked = [r for r in rows if r["role"] == role and r["attack"] == attack]
    places = {step: index for index, step in enumerate([0, *sorted({int(r["step"]) for r in attacked})])}
    for defense in dict.fromkeys(r["defense"] for r in attacked):
        curve = _seed_means(r for r in rows if r["role"] == role and r["defense"] == defense)
        colour = colours[defense]
        means = {step: sum(v.values()) / len(v) for step, v in curve.items()}
        ordered = sorted(means)
        axis.plot([places[s] for s in ordered], [means[s] for s in ordered], color=colour, label=defense, lw=1.6)
        for step, values in curve.items():
            axis.plot([places[step]] * len(values), list(values.values()), ".", color=colour, ms=4, alpha=0.6)
    concepts = {r["concept"] for r in attacked}
    real = [r for r in rows if r["role"] == "real" and r["concept"] in concepts]
    original = [r for r in rows if r["role"] == role and r["defense"] == "original"]
    for chosen, style, label in ((real, "--", "real images"), (original, ":", "before erasure")):
        if chosen:
            level = sum(float(r["value"]) for r in chosen) / len(chosen)
            axis.axhline(level, color="#777777", ls=style, lw=1, label=label)
    axis.set_xticks(list(places.values()), [str(s) for s in places])
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", color="#dddddd", lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def _seed_means(rows) -> dict[int, dict[int, float]]:
    """Return step -> seed -> mean over concepts and prompts."""
    values: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        values.setdefault(int(row["step"]), {}).setdefault(int(row["seed"]), []).append(float(row["value"]))
    return {step: {s: sum(v) / len(v) for s, v in by_seed.items()} for step, by_seed in values.items()}
