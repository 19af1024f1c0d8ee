"""Recovery curves: similarity to the concept before, erased, and along each attack, for each defense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.analysis.measurements import Measurements, Trial, measured
from harness.results.looks import Look, looks

if TYPE_CHECKING:
    from pandas import DataFrame


def recovery_curves(rows: DataFrame | Measurements, path: Path, role: str = "target") -> bool:
    """Draw `path` (PNG); return False if there is nothing to draw.

    Panels: tasks by metrics; with several attacks, a row per task and metric and a column per attack. Lines are means
    over concepts, prompts and seeds; dots are single seeds. Step 0 is the released model before the attack.
    Dashed: real images of the attack split. Dotted: the model before erasure. Metrics without a direction are left out.
    """
    table = measured(rows)
    made: dict[tuple[str, str, str], tuple[str, list[int]]] = {}  # (task, metric, attack) -> attacker, steps
    for task, attack, attacker, metric, step in table.groups:
        if step and any(table.means(task, d, attack, attacker, metric, step, role) for d in table.defenses[task]):
            made.setdefault((task, metric, attack), (attacker, []))[1].append(step)
    if not made:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot, which is slow to import

    attacks = list(dict.fromkeys(attack for _, _, attack in made))
    own = looks(list(dict.fromkeys(defense for known in table.defenses.values() for defense in known)))
    lines, columns, panels = _grid(list(dict.fromkeys(key[:2] for key in made)), attacks)
    figure = Figure(figsize=(max(5.0, 3.0 * len(columns)), 2.6 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), len(columns), squeeze=False, sharey="row" if len(attacks) > 1 else False)
    handles: dict[str, Any] = {}
    for (line, column), key in panels.items():
        axis = axes[line][column]
        if key not in made:
            axis.set_axis_off()
            continue
        _panel(axis, table, key, *made[key], role, own)
        drawn, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
        axis.set_title(key[2] if len(attacks) > 1 else f"{key[0]}: {key[1]}", fontsize=9)
    for line, label in zip(axes, lines, strict=True):
        line[0].set_ylabel(label, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("attack step", fontsize=8)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(2 * len(columns), len(handles)),
        fontsize=8, frameon=False,
    )  # fmt: skip
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(path)  # savefig would draw twice, once for layout
    return True


def _grid(
    scales: Sequence[tuple[str, str]], attacks: Sequence[str]
) -> tuple[list[str], list[str], dict[tuple[int, int], tuple[str, str, str]]]:
    """Return (row labels, column labels, (row, column) -> (task, metric, attack)) of (task, metric) pairs."""
    if len(attacks) > 1:
        lines = [f"{task}\n{metric}" for task, metric in scales]
        panels = {(i, j): (*scale, attack) for i, scale in enumerate(scales) for j, attack in enumerate(attacks)}
        return lines, list(attacks), panels
    tasks, metrics = (list(dict.fromkeys(each)) for each in zip(*scales, strict=True))
    panels = {(tasks.index(task), metrics.index(metric)): (task, metric, attacks[0]) for task, metric in scales}
    return ["similarity to the references"] * len(tasks), metrics, panels


def _panel(
    axis,
    table: Measurements,
    key: tuple[str, str, str],
    attacker: str,
    steps: Sequence[int],
    role: str,
    own: Mapping[str, Look],
) -> None:
    """Draw one task, metric and attack."""
    task, metric, attack = key
    places = {step: index for index, step in enumerate([0, *sorted(steps)])}
    concepts = set()
    for defense in table.defenses[task]:
        attacked = {step: table.means(task, defense, attack, attacker, metric, step, role) for step in steps}
        if not any(attacked.values()):
            continue
        concepts |= {concept for found in attacked.values() for _, concept, _ in found}
        attacked[0] = table.means(task, defense, "", "", metric, 0, role)
        curve = {step: _by_seed(found) for step, found in attacked.items() if found}
        means = {step: _mean(by_seed.values()) for step, by_seed in curve.items()}
        ordered = sorted(means)
        look = own[defense]
        where, heights = [places[s] for s in ordered], [means[s] for s in ordered]
        axis.plot(where, heights, look.line, color=look.colour, label=defense, lw=1.6)
        dots = [(places[step], value) for step, by_seed in curve.items() for value in by_seed.values()]
        axis.plot(*zip(*dots, strict=True), look.mark, color=look.colour, ms=2, mew=0, alpha=0.6)
    real = table.means(task, "", "", "", metric, 0, "real")
    levels = (
        ([value for (_, concept, _), value in real.items() if concept in concepts], "--", "real images"),
        (list(table.means(task, "original", "", "", metric, 0, role).values()), ":", "before erasure"),
    )
    for values, style, label in levels:
        if values:
            axis.axhline(_mean(values), color="#777777", ls=style, lw=1, label=label)
    axis.set_xticks(list(places.values()), [str(s) for s in places])
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", color="#dddddd", lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def _by_seed(values: Mapping[Trial, float]) -> dict[int, float]:
    """Return seed -> mean over concepts."""
    grouped: dict[int, list[float]] = {}
    for (_, _, seed), value in values.items():
        grouped.setdefault(seed, []).append(value)
    return {seed: _mean(listed) for seed, listed in grouped.items()}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
