"""Recovery curves: similarity to the concept before, erased, and along the attack, for each defense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, told apart by readers who do not see all colours, and four of Tol's muted one after it
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442",
    "#882255", "#999933", "#332288", "#44AA99",
)  # fmt: skip

DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (3, 3), (1, 3), (9, 3))
"""Attacks are told apart by dashes, defenses by colour."""


def recovery_curves(rows: Sequence[Mapping[str, Any]], path: Path, role: str = "target") -> bool:
    """Draw `path` (PNG), a panel for each task and metric; return False when there is nothing to draw.

    Lines are means over concepts, prompts and seeds; dots are seeds. Step 0 is the released model before the attack.
    Dashed: real images of the attack split. Dotted: the model before erasure.
    """
    panels = list(dict.fromkeys((r["task"], r["metric"]) for r in rows if r["role"] == role and r["attack"]))
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _ in panels))
    metrics = list(dict.fromkeys(metric for _, metric in panels))
    figure, axes = pyplot.subplots(
        len(tasks), len(metrics), figsize=(3.6 * len(metrics), 3.0 * len(tasks)), squeeze=False, layout="constrained"
    )
    for task, metric in panels:
        axis = axes[tasks.index(task)][metrics.index(metric)]
        mine = [r for r in rows if r["task"] == task and r["metric"] == metric]
        _panel(axis, mine, role)
        axis.set_title(f"{task}: {metric}", fontsize=9)
    for row in axes:
        row[0].set_ylabel("similarity to the references", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("attack step", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(2 * len(metrics), len(labels)), fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _panel(axis, rows: Sequence[Mapping[str, Any]], role: str) -> None:
    """Draw one task and metric."""
    attacked = [r for r in rows if r["role"] == role and r["attack"]]
    steps = sorted({int(r["step"]) for r in attacked})
    places = {step: index for index, step in enumerate([0, *steps])}
    defenses = list(dict.fromkeys(r["defense"] for r in attacked))
    attacks = list(dict.fromkeys(r["attack"] for r in attacked))
    for index, defense in enumerate(defenses):
        for attack in attacks:
            curve = _seed_means(
                r for r in rows if r["role"] == role and r["defense"] == defense and r["attack"] in ("", attack)
            )
            if not curve:
                continue
            colour = COLOURS[index % len(COLOURS)]
            means = {step: sum(v.values()) / len(v) for step, v in curve.items()}
            ordered = sorted(means)
            label = defense if len(attacks) == 1 else f"{defense} / {attack}"
            dashes = DASHES[attacks.index(attack) % len(DASHES)]
            xs, ys = [places[s] for s in ordered], [means[s] for s in ordered]
            axis.plot(xs, ys, color=colour, label=label, lw=1.6, dashes=dashes)
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
