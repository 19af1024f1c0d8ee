"""The pictures of memorization tasks: ROC curves, scores, the trade-off, tokens, and a sheet of replayed images.

The registry imports this module with the tasks, so numpy and matplotlib are imported inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import one_line
from harness.results.looks import COLOURS
from harness.store.layout import step_folder

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.analysis.cells import Cell
    from harness.contracts.diagnostic import MeasuredRun

Line = Mapping[str, Any]
Detected = Sequence[tuple[Line, "Cell", "Cell"]]
MARKS = "osD^vP*X<>"
DRAWN_BY = {"base": "drawn before memorizing", "none": "drawn after memorizing"}
SHEET_ROWS, SHEET_IMAGES = 8, 4
"""Prompts of each kind on the sheet, and images of each model for a prompt."""


def roc(detected: Detected, path: Path) -> bool:
    """Draw a panel for each task and set of negatives: the ROC curve of each detector, over all seeds together."""
    from harness.analysis import detection

    panels: dict[tuple[str, str], list[tuple[Line, Cell, Cell]]] = {}
    for each in detected:
        panels.setdefault((each[0]["task"], each[0]["negatives"]), []).append(each)
    figure, axes = _grid(len(panels), 4.2, 4.0)
    for axis, ((task, negatives), own) in zip(axes, panels.items(), strict=False):
        for place, (line, memorized, negative) in enumerate(own):
            scores, labels = detection.pooled(memorized.values, negative.values, memorized.first["detector_direction"])
            false, true = detection.roc(scores, labels)[:2]
            axis.plot(
                false, true, color=COLOURS[place % len(COLOURS)], ls=("-", "--", ":")[place // len(COLOURS) % 3],
                lw=1.4, label=f"{line['detector']}  {line['auc']:.3f}",
            )  # fmt: skip
        axis.axvline(0.01, color="#bbbbbb", lw=0.8)
        axis.set_xscale("symlog", linthresh=0.01, linscale=0.6)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.01, 0.1, 1], ["0", "1 %", "10 %", "100 %"])
        axis.set_ylim(0, 1.02)
        axis.set_title(one_line(f"{task}: against {negatives}", 60), fontsize=8)
        axis.set_xlabel("false alarms (linear below 1 %)", fontsize=8)
        axis.set_ylabel("memorized prompts found", fontsize=8)
        axis.legend(fontsize=6.5, frameon=False, loc="lower right", title="detector, AUC", title_fontsize=6.5)
        _plain(axis)
    return _print(figure, path)


def scores(detected: Detected, path: Path) -> bool:
    """Draw a panel for each task and detector: how scores of memorized prompts and of negatives are distributed."""
    import numpy as np

    panels: dict[tuple[str, str], list[tuple[Line, Cell, Cell]]] = {}
    for each in detected:
        panels.setdefault((each[0]["task"], each[0]["detector"]), []).append(each)
    figure, axes = _grid(len(panels), 3.0, 2.4)
    for axis, ((task, called), own) in zip(axes, panels.items(), strict=False):
        groups = [("memorized", own[0][1].values.mean(axis=0))]
        groups += [(line["negatives"].partition(":")[0], negative.values.mean(axis=0)) for line, _, negative in own]
        everything = np.concatenate([values for _, values in groups])
        edges = np.linspace(everything.min(), everything.max(), 25) if np.ptp(everything) else 10
        for place, (name, values) in enumerate(groups):
            colour = ("#D55E00", "#0072B2", "#009E73", "#999933")[place % 4]
            weights = np.full(len(values), 1 / len(values))
            axis.hist(values, edges, weights=weights, color=colour, alpha=0.55, label=name)
        axis.set_title(one_line(f"{task}: {called}" if len(panels) > 1 else task, 40), fontsize=8)
        axis.set_ylabel("share of prompts", fontsize=7)
        _plain(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return _print(figure, path)


def tradeoff(lines: Sequence[Line], path: Path) -> bool:
    """Draw a panel for each task: similarity against alignment, a mark for each setting, a line for each method."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure, axes = _grid(len(tasks), 6.4, 4.8)
    is_drawn = False
    for axis, task in zip(axes, tasks, strict=False):
        own = [
            line for line in lines
            if line["task"] == task and line["similarity"] is not None and line["alignment"] is not None
        ]  # fmt: skip
        families: dict[tuple[str, str], list[Line]] = {}
        for line in own:
            families.setdefault((line["method"], line["when"]), []).append(line)
        for place, ((method, when), points) in enumerate(families.items()):
            is_drawn = True
            points = sorted(points, key=lambda line: line["similarity"])
            x, y = [line["similarity"] for line in points], [line["alignment"] for line in points]
            colour = COLOURS[place % len(COLOURS)]
            name = "base model, before" if not method else "no mitigation" if method == "none" else method
            axis.plot(
                x, y, color=colour, lw=1.2, ls="--" if when == "training" else "-",
                marker=MARKS[place % len(MARKS)], ms=6,
                label=f"{name}{', in training' if when == 'training' else ''}",
            )  # fmt: skip
            for line in points:
                ends = [line[f"{name}{end}"] for name in ("similarity", "alignment") for end in ("_low", "_high")]
                if None not in ends:
                    left, right, bottom, top = ends
                    axis.plot([left, right], [line["alignment"]] * 2, color=colour, lw=0.6, alpha=0.5)
                    axis.plot([line["similarity"]] * 2, [bottom, top], color=colour, lw=0.6, alpha=0.5)
                if line["place"] == "front":
                    axis.plot(
                        line["similarity"], line["alignment"], "o", ms=12, mfc="none", mec=colour, mew=1.0
                    )  # fmt: skip
                axis.annotate(
                    line["mitigation"], (line["similarity"], line["alignment"]), textcoords="offset points",
                    xytext=(6, 4), fontsize=6, color="#444444",
                )  # fmt: skip
        front = sorted((line["similarity"], line["alignment"]) for line in own if line["is_on_means_front"])
        if front:
            axis.plot(*zip(*front, strict=True), color="#bbbbbb", lw=6, alpha=0.5, zorder=0, label="front of the means")
        axis.set_xlabel("similarity to the own training image (low is good)", fontsize=8)
        axis.set_ylabel("alignment with the prompt (high is good)", fontsize=8)
        axis.set_title(one_line(task, 60), fontsize=9)
        axis.legend(fontsize=7, frameon=False)
        _plain(axis)
    return is_drawn and _print(figure, path)


def token_bars(lines: Sequence[Line], path: Path) -> bool:
    """Draw a panel for each explained prompt: the share of each token, by the first set of steps."""
    shown: dict[tuple[str, int], list[Line]] = {}
    for line in lines:
        key = line["task"], line["prompt_index"]
        if not shown.get(key) or shown[key][0]["steps"] == line["steps"]:
            shown.setdefault(key, []).append(line)
    listed = list(shown.items())[:12]
    figure, axes = _grid(len(listed), 4.0, 2.2)
    for axis, (_, own) in zip(axes, listed, strict=False):
        places = range(len(own))
        axis.bar(places, [line["share"] for line in own], color="#0072B2")
        words = [one_line(line["token"], 14) for line in own]
        axis.set_xticks(list(places), words, rotation=50, ha="right", fontsize=7)
        axis.set_title(one_line(own[0]["prompt"], 60), fontsize=7)
        axis.set_ylabel("share", fontsize=7)
        _plain(axis)
    return _print(figure, path)


def sheet(run: MeasuredRun, rows: DataFrame, path: Path) -> bool:
    """Draw the sheet: of each prompt its training image, then images of the base and of the memorizing model.

    The first prompts of each set, at the first seed. Returns False where no images with training images are here.
    """
    from PIL import Image

    found = rows[(rows["metric"] == "similarity") & rows["defense"].isin(("base", "none"))]
    if not len(found):
        return False
    blocks: dict[tuple[str, str], dict[str, Any]] = {}
    for line in found.drop_duplicates(["task", "concept", "defense"]).itertuples(index=False):
        blocks.setdefault((str(line.task), str(line.concept)), {})[str(line.defense)] = line
    pictures: list[tuple[str, Image.Image, dict[str, list[Image.Image]]]] = []
    for (task, concept), models in blocks.items():
        record = run.store.record("own_similarity", next(iter(models.values())).score_key)["identity"]
        features = run.store.record("features", record["inputs"]["references"])["identity"]
        originals = run.store.path("originals", features["inputs"]["images"]) / "reference"
        owners = record["parameters"]["owners"]
        for prompt in range(min(SHEET_ROWS, record["parameters"]["prompts"])):
            original = originals / f"{owners.index(prompt):05d}.png"
            drawn = {}
            for called, model in models.items():
                folder = run.store.path("replay", model.sample_key) / "images" / step_folder(0)
                drawn[called] = sorted(folder.glob(f"{prompt:03d}_*.png"))[:SHEET_IMAGES]
            if not original.is_file() or not all(drawn.values()):
                return False
            of_models = {called: [Image.open(file) for file in own] for called, own in drawn.items()}
            pictures.append((f"task {task}: the first prompts of '{concept}'", Image.open(original), of_models))
    _lay_out(pictures, path)
    return True


def _lay_out(pictures: Sequence[tuple[str, Any, Mapping[str, list[Any]]]], path: Path) -> None:
    """Write rows of images, (heading, training image, model -> images), with headings above each group of rows."""
    from PIL import Image, ImageDraw

    side = min(max(pictures[0][1].size), 128)
    gap, head = 4, 16
    groups = list(dict.fromkeys(name for name, _, _ in pictures))
    width = max(
        (1 + sum(map(len, drawn.values()))) * (side + gap) + gap * (2 + len(drawn)) for _, _, drawn in pictures
    )
    height = len(pictures) * (side + gap) + len(groups) * (2 * head + gap) + gap
    made = Image.new("RGB", (width, height), "white")
    write = ImageDraw.Draw(made)
    top, last = gap, None
    for name, original, drawn in pictures:
        if name != last:
            write.text((gap, top), name, fill="black")
            left = gap
            of_models = [(DRAWN_BY.get(called, called), len(own)) for called, own in drawn.items()]
            for called, count in (("training image", 1), *of_models):
                write.text((left, top + head), called, fill="#555555")
                left += count * (side + gap) + 2 * gap
            top += 2 * head
            last = name
        left = gap
        for own in ([original], *drawn.values()):
            for image in own:
                fitted = image.convert("RGB").resize((side, side))
                made.paste(fitted, (left, top))
                left += side + gap
            left += 2 * gap
        top += side + gap
    made.save(path, "PNG")


def _grid(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure and the axes of its panels, at most four a row; further axes are hidden."""
    from matplotlib.figure import Figure

    columns = min(max(panels, 1), max(1, int(13 / width)))
    lines = -(-max(panels, 1) // columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.3), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes


def _plain(axis: Any) -> None:
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", color="#dddddd", lw=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _print(figure: Any, path: Path) -> bool:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(path)
    return True
