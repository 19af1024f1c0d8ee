"""The lines of the memorization tables, from rows: detection, images drawn, mitigations, tokens.

The registry imports this module with the tasks, so numpy is imported inside functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.stages.explain import FILE as TOKENS_FILE
from harness.stages.own_similarity import FILE as SIMILARITIES_FILE
from harness.tasks.memorization_columns import DRAWN, MITIGATIONS, STATISTICS

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.analysis import statistics
    from harness.analysis.cells import Cell
    from harness.contracts.diagnostic import MeasuredRun

Line = dict[str, Any]


# -- detection -------------------------------------------------------------------------------------------------------


def detections(rows: DataFrame) -> Iterator[tuple[Line, Cell, Cell]]:
    """Yield the line of each detector against each set of negatives, with the scores of both sides."""
    from harness.analysis import detection
    from harness.analysis.cells import cells, common

    if not len(rows):
        return
    found = cells(rows, ["task", "detector", "role", "concept"])
    for (task, called, role, _), memorized in found.items():
        if role != "memorized":
            continue
        for (of, other, against, name), negative in found.items():
            if (of, other, against) != (task, called, "negative"):
                continue
            positives, negatives, n_seeds = common(memorized, negative)
            if not n_seeds:
                continue
            about = memorized.first
            measured = detection.measured(positives, negatives, about["detector_direction"])
            line = {
                "task": task,
                "detector": called,
                "method": about["detector_method"],
                "memorized": about["prompts"],
                "negatives": f"{name}: {negative.first['prompts']}",
                "steps": about["steps_used"],
                "images": int(about["images_used"]),
                "latents": about["latents"],
                "prediction": about["prediction"],
                "precision": about["precision"],
                "n_memorized": positives.shape[1],
                "n_negatives": negatives.shape[1],
                "n_seeds": n_seeds,
                "passes": float(about["passes"]),
            }
            for statistic in STATISTICS:
                of_it = measured[statistic]
                line |= {statistic: of_it.value, f"{statistic}_low": of_it.low, f"{statistic}_high": of_it.high}
            yield line, memorized, negative


# -- images drawn ----------------------------------------------------------------------------------------------------


def drawn(rows: DataFrame, run: MeasuredRun) -> list[Line]:
    """Return a line for each model and set of prompts."""
    from harness.analysis.cells import cells

    if not len(rows):
        return []
    found = cells(rows, ["task", "defense", "concept", "metric"])
    lines = []
    for task, label, concept in dict.fromkeys(key[:3] for key in found):
        own = {metric: cell for (*about, metric), cell in found.items() if tuple(about) == (task, label, concept)}
        lines.append(_drawn_line(task, label, concept, own, run))
    return lines


def _drawn_line(task: str, label: str, concept: str, own: Mapping[str, Cell], run: MeasuredRun) -> Line:
    any_cell = next(iter(own.values()))
    line: Line = {
        **dict.fromkeys(DRAWN),
        "task": task,
        "mitigation": label,
        "method": any_cell.first["method"],
        "when": any_cell.first["when"],
        "setting": any_cell.first["setting"],
        "prompts": concept,
        "role": any_cell.first["role"],
        "n_prompts": max(cell.values.shape[1] for cell in own.values()),
        "n_seeds": len(any_cell.seeds),
    }
    for name in ("similarity", "alignment"):
        if name in own:
            line |= _interval(name, own[name].estimate)
    if "similarity" in own:
        line |= _by_image(own["similarity"], run)
    for metric, cell in own.items():
        if metric not in ("similarity", "alignment"):
            line[metric] = float(cell.values.mean())
    return line


def _interval(name: str, of: statistics.Estimate) -> Line:
    low, high = of.interval()
    return {name: of.value, f"{name}_low": low, f"{name}_high": high}


def similarities(run: MeasuredRun, score_key: str) -> Mapping[str, list[list[float | None]]]:
    """Return the similarities of every image of a stage, to own and other training images: [prompt][image]."""
    return json.loads(run.store.content("own_similarity", score_key, SIMILARITIES_FILE))


def _by_image(cell: Cell, run: MeasuredRun) -> Line:
    """Return what needs single images: the greatest and least similarity of a prompt, and the share of copies."""
    greatest, least, recognised = [], [], []
    images = 0
    for _, score_key in cell.keys:
        known = similarities(run, score_key)
        images = len(known["own"][0])
        greatest += [max(own) for own in known["own"]]
        least += [min(own) for own in known["own"]]
        recognised += [
            own > other
            for owns, others in zip(known["own"], known["other"], strict=True)
            for own, other in zip(owns, others, strict=True)
            if other is not None
        ]
    return {
        "n_images": images,
        "similarity_max": sum(greatest) / len(greatest),
        "similarity_min": sum(least) / len(least),
        "recognised": sum(recognised) / len(recognised) if recognised else None,
    }


# -- mitigations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traded:
    """The models of a task that have both quantities on the memorized prompts, and their resampled means."""

    labels: list[str]
    first: dict[str, Mapping[str, Any]]
    similarity: statistics.Resampled
    alignment: statistics.Resampled


def traded(rows: DataFrame, task: str) -> Traded | None:
    """Return them, without the base model; None if there are fewer than two."""
    import numpy as np

    from harness.analysis import statistics
    from harness.analysis.cells import cells

    own = rows[(rows["task"] == task) & (rows["role"] == "memorized") & (rows["defense"] != "base")]
    if not len(own):
        return None
    found = cells(own, ["defense", "metric"])
    labels = [
        label for label in dict.fromkeys(key[0] for key in found)
        if (label, "similarity") in found and (label, "alignment") in found
    ]  # fmt: skip
    if len(labels) < 2:
        return None
    seeds = [
        seed for seed in found[labels[0], "similarity"].seeds
        if all(seed in found[label, name].seeds for label in labels for name in ("similarity", "alignment"))
    ]  # fmt: skip
    if not seeds:
        return None

    def resampled(name: str) -> statistics.Resampled:
        by_label = []
        for label in labels:
            cell = found[label, name]
            by_label.append(cell.values[[cell.seeds.index(seed) for seed in seeds]].T)
        return statistics.resample([np.stack(by_label)])

    first = {label: found[label, "similarity"].first for label in labels}
    return Traded(labels, first, resampled("similarity"), resampled("alignment"))


def mitigations(lines: list[Line], rows: DataFrame, run: MeasuredRun) -> Iterator[Line]:
    """Yield a line for each mitigation of each task, with its place in the trade-off."""
    from harness.analysis import tradeoff

    passes = _passes(rows, run)
    for task in dict.fromkeys(line["task"] for line in lines):
        known = traded(rows, task)
        place, front = {}, frozenset()
        if known is not None:
            means = known.similarity.value.tolist(), known.alignment.value.tolist()
            place = tradeoff.places(known.labels, known.similarity, known.alignment)
            front = tradeoff.front_of_means(known.labels, *means)
        for line in lines:
            if line["task"] != task or line["role"] != "memorized":
                continue
            beside = next(
                (other for other in lines
                 if (other["task"], other["mitigation"]) == (task, line["mitigation"]) and other["role"] == "negative"),
                {},
            )  # fmt: skip
            yield {
                **{name: line.get(name) for name in MITIGATIONS},
                "place": place.get(line["mitigation"], ""),
                "is_on_means_front": line["mitigation"] in front if known is not None else None,
                "passes_an_image": passes.get((task, line["mitigation"])),
                **{
                    f"unplanted_{name}": beside.get(name)
                    for name in ("similarity", "alignment", "alignment_low", "alignment_high")
                },
                **{name: value for name, value in beside.items() if name not in DRAWN},
            }


def _passes(rows: DataFrame, run: MeasuredRun) -> dict[tuple[str, str], float]:
    """Return (task, mitigation) -> measured UNet passes for each image drawn for memorized prompts."""
    found: dict[tuple[str, str], list[float]] = {}
    own = rows[rows["role"] == "memorized"][["task", "defense", "sample_key"]].drop_duplicates()
    for line in own.itertuples(index=False):
        if not run.store.has("replay", line.sample_key):
            continue
        record = run.store.record("replay", line.sample_key)
        images = sum(1 for _ in (run.store.path("replay", line.sample_key) / "images").rglob("*.png"))
        ledger = record["ledger"]
        found.setdefault((line.task, line.defense), []).append(
            (ledger["forward_passes"] + 2 * ledger["backward_passes"]) / max(images, 1)
        )
    return {key: sum(listed) / len(listed) for key, listed in found.items()}


def at_equal_similarity(rows: DataFrame, lines: list[Line]) -> Iterator[Line]:
    """Yield, for each method with its settings, the alignment where the similarity is half way to the base model's.

    Half way between the memorizing model's and that of the base model before it memorized; without such a base, the
    least similarity that any setting reaches. Each curve begins at the memorizing model.
    """
    from harness.analysis import tradeoff

    for task in dict.fromkeys(line["task"] for line in lines):
        known = traded(rows, task)
        if known is None or "none" not in known.labels:  # a run that is not finished
            continue
        own = [line for line in lines if line["task"] == task and line["role"] == "memorized"]
        of = {line["mitigation"]: line["similarity"] for line in own}
        floor = of.get("base", float(known.similarity.value.min()))
        level = (of["none"] + floor) / 2
        curves: dict[tuple[str, str], list[int]] = {}
        start = known.labels.index("none")
        for index, label in enumerate(known.labels):
            about = known.first[label]
            if index != start:
                curves.setdefault((about["method"], about["when"]), [start]).append(index)
        found = tradeoff.at_level(curves, known.similarity, known.alignment, level)
        for (method, when), own in found.items():
            line = {
                "task": task, "method": method, "when": when, "n_settings": len(curves[method, when]) - 1,
                "level": level, "n_seeds": known.similarity.seeds,
            }  # fmt: skip
            none = {"alignment": None, "alignment_low": None, "alignment_high": None}
            yield line | (none if own is None else _interval("alignment", own))


# -- tokens ----------------------------------------------------------------------------------------------------------


def tokens(rows: DataFrame, run: MeasuredRun) -> Iterator[Line]:
    """Yield a line for each token of each explained prompt, means over seeds."""
    if not len(rows):
        return
    once = rows[["task", "steps_used", "profile", "seed", "score_key"]].drop_duplicates()
    for (task, steps, profile), own in once.groupby(["task", "steps_used", "profile"], sort=False, observed=True):
        read = [json.loads(run.store.content("explain", key, TOKENS_FILE)) for key in own["score_key"]]
        for index, first in enumerate(read[0]):
            for place, token in enumerate(first["tokens"]):
                mean = {
                    name: sum(each[index][name][place] for each in read) / len(read)
                    for name in ("significance", "share")
                }
                yield {
                    "task": task, "prompt_index": index, "prompt": first["prompt"], "steps": steps, "profile": profile,
                    "token_index": place, "token": token, **mean, "n_seeds": len(read),
                }  # fmt: skip
