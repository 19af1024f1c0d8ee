"""The pictures of pruning tasks: suppression against quality, and a sheet of drawn images.

The registry imports this module with the tasks, so matplotlib is imported inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import one_line
from harness.results.looks import looks
from harness.store.layout import step_folder
from harness.tasks.pruning_form import PRUNED, UNPRUNED
from harness.tasks.pruning_values import leading_target_metric

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun

Line = Mapping[str, Any]
SHEET_PROMPTS = 2
"""Prompts of each concept on the sheet."""
SIDE = 96
"""Side of an image on the sheet, in pixels."""


def tradeoff(lines: Sequence[Line], path: Path) -> bool:
    """Draw a panel for each task and set of targets: quality of general images against similarity to the targets.

    By the first metric of sets, and the first metric of targets, one that is no alignment with text if there is one.
    Returns False where a run has none of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quality = _first(lines, "general", lower=True) or _first(lines, "general")
    similarity = leading_target_metric(lines)
    if quality is None or similarity is None:
        return False
    panels = list(dict.fromkeys((line["task"], line["targets"]) for line in lines))
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.8 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    models = list(dict.fromkeys(line["recipe"] for line in lines))
    recipes = looks(model for model in models if model not in (UNPRUNED, PRUNED))  # as in the figure of the attacks
    for axis, (task, targets) in zip(axes, panels, strict=False):
        for place, recipe in enumerate(models):
            x = _line(lines, task, targets, recipe, "general", quality)
            y = _line(lines, task, targets, recipe, "target", similarity)
            if x is None or y is None or x["value"] is None or y["value"] is None:
                continue
            colour = recipes[recipe].colour if recipe in recipes else "black"
            fill = "white" if recipe == PRUNED else colour
            axis.plot(x["value"], y["value"], "o^sDvP*X"[place % 8], color=colour, mfc=fill, ms=7, label=recipe)
            if x["value_low"] is not None and y["value_low"] is not None:
                axis.plot([x["value_low"], x["value_high"]], [y["value"]] * 2, color=colour, lw=0.8, alpha=0.6)
                axis.plot([x["value"]] * 2, [y["value_low"], y["value_high"]], color=colour, lw=0.8, alpha=0.6)
        axis.set_xlabel(f"{quality} of general captions ({_wanted(lines, quality)})", fontsize=8)
        axis.set_ylabel(f"{similarity} of targets (low is wanted)", fontsize=8)
        axis.set_title(one_line(f"{task}: {targets}", 60), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 * columns, fontsize=7, frameon=False)
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(path)
    return True


def _first(lines: Sequence[Line], measure: str, *, lower: bool = False) -> str | None:
    """Return the first metric of a measure; `lower`: of those whose less is better."""
    return next(
        (line["metric"] for line in lines
         if line["measure"] == measure and (not lower or line["direction"] == "lower")),
        None,
    )  # fmt: skip


def _line(lines: Sequence[Line], task: str, targets: str, recipe: str, measure: str, metric: str) -> Line | None:
    wanted = (task, targets, recipe, measure, metric)
    names = ("task", "targets", "recipe", "measure", "metric")
    return next((line for line in lines if tuple(line[name] for name in names) == wanted), None)


def _wanted(lines: Sequence[Line], metric: str) -> str:
    direction = next(line["direction"] for line in lines if line["metric"] == metric)
    return f"{'low' if direction == 'lower' else 'high'} is good"


def sheet(run: MeasuredRun, rows: DataFrame, path: Path) -> bool:
    """Draw, for each task and set of targets, a row for each prompt and a column for each model, at the first seed.

    Before any attack: prompts of targets, innocents and utility concepts, and general captions. Returns False where no
    images are here.
    """
    from PIL import Image, ImageDraw

    own = rows[(rows["attack"] == "") & ~rows["role"].isin(("real", "floor")) & (rows["part"] != "works")]
    if not len(own):
        return False
    own = own[own["seed"] == own["seed"].iloc[0]].drop_duplicates(["task", "protected", "concept", "defense"])
    models = list(dict.fromkeys(own["defense"]))
    lines: list[tuple[str, str, list[Path | None]]] = []
    for (task, protected, concept), part in own.groupby(["task", "protected", "concept"], sort=False, observed=True):
        folders = {str(r.defense): _images(run, str(r.role), str(r.sample_key)) for r in part.itertuples(index=False)}
        for prompt in range(SHEET_PROMPTS):
            files = [next(iter(sorted(folders[m].glob(f"{prompt:03d}_*.png"))), None) if m in folders else None
                     for m in models]  # fmt: skip
            if any(files):
                lines.append((f"{task}: {protected}", str(concept), files))
    if not lines:
        return False
    gap, head, left = 4, 16, 150
    groups = list(dict.fromkeys(group for group, _, _ in lines))
    width = left + len(models) * (SIDE + gap)
    made = Image.new("RGB", (width, len(lines) * (SIDE + gap) + len(groups) * 2 * head + gap), "white")
    write = ImageDraw.Draw(made)
    top, last = gap, None
    for group, concept, files in lines:
        if group != last:
            write.text((gap, top), group, fill="black")
            for place, model in enumerate(models):
                write.text((left + place * (SIDE + gap), top + head), one_line(model, 15), fill="#555555")
            top, last = top + 2 * head, group
        write.text((gap, top + SIDE // 2), one_line(concept, 22), fill="#555555")
        for place, file in enumerate(files):
            if file is not None:
                made.paste(Image.open(file).convert("RGB").resize((SIDE, SIDE)), (left + place * (SIDE + gap), top))
        top += SIDE + gap
    made.save(path, "PNG")
    return True


def _images(run: MeasuredRun, role: str, key: str) -> Path:
    kind = "replay" if role == "general" else "sample"
    return run.store.path(kind, key) / "images" / step_folder(0)
