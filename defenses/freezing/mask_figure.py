"""Figure of the frozen share by kind of tensor and by block of the UNet, and of the agreement between seeds' masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from defenses.freezing import masks
from defenses.freezing.masks import Mask

_OWN, _CHANCE, _START = "#0072B2", "#777777", "#D55E00"


def draw(found: Sequence[Mask], path: Path) -> bool:
    """Draw `path` (PNG), a row for each defense of each task; return False if nothing was frozen.

    Left: share of frozen tensors, mean over seeds and protected sets. Right: overlap of two seeds' masks, with the
    overlap expected by chance, and the mask's correlation with the random start of its learning.
    """
    rows = list(dict.fromkeys((m.task, m.defense) for m in found))
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    tensors = next(iter(found)).elements
    blocks = sorted(dict.fromkeys(map(masks.block, tensors)), key=_along_the_way)
    kinds = [kind for kind in masks.KINDS if any(masks.kind(n) == kind for n in tensors)]
    columns = [("kind", masks.kind, kind) for kind in kinds] + [("block", masks.block, block) for block in blocks]
    shares = np.array(
        [
            [_share([m for m in found if (m.task, m.defense) == row], of, wanted) for _, of, wanted in columns]
            for row in rows
        ]
    )
    height = 1.6 + 0.24 * len(rows)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, height), width_ratios=(3, 1.3), sharey=True, layout="constrained"
    )
    image = left.imshow(100 * shares, aspect="auto", cmap="Blues", vmin=0, vmax=100)
    left.set_xticks(range(len(columns)), [c for _, _, c in columns], rotation=45, ha="right", fontsize=7)
    tasks = list(dict.fromkeys(task for task, _ in rows))
    left.set_yticks(
        range(len(rows)), [d if len(tasks) == 1 else f"{t}: {d}" for t, d in rows], fontsize=7
    )
    left.axvline(len(kinds) - 0.5, color="white", lw=3)
    for line in range(1, len(rows)):
        if rows[line][0] != rows[line - 1][0]:
            for axis in (left, right):
                axis.axhline(line - 0.5, color="#444444", lw=0.6)
    for i, line in enumerate(shares):
        for j, share in enumerate(line):
            colour = "white" if share > 0.55 else "black"
            left.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=colour)
    left.set_title("frozen tensors, %, by kind and by block", fontsize=9)
    figure.colorbar(image, ax=left, fraction=0.03, pad=0.01).ax.tick_params(labelsize=6)
    _agreement(right, rows, masks.table(found))
    if right.get_legend_handles_labels()[0]:  # with one seed there are no two masks to compare
        figure.legend(loc="outside lower right", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _along_the_way(block: str) -> tuple[int, str]:
    return ("in", "time", "down", "mid", "up", "out").index(block.split()[0]), block


def _share(found: Sequence[Mask], kind_of: Any, wanted: str) -> float:
    """Return the frozen share of the tensors of a kind or block, mean over masks."""
    shares = []
    for mask in found:
        own = [name for name in mask.elements if kind_of(name) == wanted]
        shares.append(sum(name in mask.frozen for name in own) / len(own))
    return sum(shares) / len(shares)


def _agreement(axis: Any, rows: Sequence[tuple[str, str]], lines: Sequence[Mapping[str, Any]]) -> None:
    marks = (
        ("overlap_of_seeds", "overlap of two seeds' masks", _OWN, "o"),
        ("overlap_by_chance", "of random sets as large", _CHANCE, "|"),
        ("correlation_with_start", "correlation with the random start", _START, "x"),
    )
    for column, label, colour, marker in marks:
        points = [
            (line[column], rows.index((line["task"], line["defense"]))) for line in lines if line[column] is not None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=colour, ms=5, ls="", label=label, alpha=0.8)
    axis.set_xlim(-0.35, 1.05)
    axis.axvline(0, color="#cccccc", lw=0.8)
    axis.grid(axis="x", color="#eeeeee", lw=0.5)
    axis.tick_params(labelsize=7)
    axis.tick_params(axis="y", left=False, labelleft=False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title("do masks agree?", fontsize=9)
