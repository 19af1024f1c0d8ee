"""The lines of the pruning tables, from rows: what each recipe keeps and suppresses, and what it costs.

The registry imports this module with the tasks, so numpy is imported inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.tasks.pruning_columns import ATTACKED, COST, MEASURES, SOON
from harness.tasks.pruning_form import PRUNED, UNPRUNED
from harness.tasks.pruning_values import CP, CP_DISTILLED, Line, groups_of, interval_of, measured, stacked, values_of

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

    from harness.analysis import statistics
    from harness.contracts.diagnostic import MeasuredRun


def of(rows: DataFrame) -> list[Line]:
    """Return a line for each task, set of targets, measure, metric and model, with its difference to the control.

    A measure is the part or role: general, works, target, innocent, utility. Differences are paired by concept, prompt
    and seed; p-values are corrected over the recipes of one task, set, measure and metric (Holm).
    """
    own = measured(rows)
    lines = []
    for (task, protected, measure, metric), group in own.groupby(
        ["task", "protected", "measure", "metric"], sort=False, observed=True
    ):
        about = {"task": task, "targets": protected, "measure": measure, "metric": metric}
        by_model = _by_model(group)
        first = {str(label): part.iloc[0] for label, part in group.groupby("defense", sort=False, observed=True)}
        direction = str(group["direction"].iloc[0])
        lines += _compared(about, direction, by_model, first)
        if measure == "target" and group["text_metric"].iloc[0] == metric:
            control = next((label for label in by_model if first[label]["method"] == "none"), None)
            for name, reference in ((CP, UNPRUNED), (CP_DISTILLED, control)):
                if reference in by_model:
                    beaten = {label: _fits_less(own, by_model[reference]) for label, own in by_model.items()}
                    known = {label: own for label, own in beaten.items() if own and label != reference}
                    lines += _compared({**about, "metric": name}, "lower", known, first)
    return lines


def _fits_less(cells: Mapping[str, tuple], base: Mapping[str, tuple]) -> dict[str, tuple]:
    """Return concept -> 1 where a model's value is strictly lower than the base's, at the seeds that both have."""
    made = {}
    for name, (seeds, values) in cells.items():
        if name not in base:
            continue
        theirs, others = base[name]
        both = [seed for seed in seeds if seed in theirs]
        if both:
            mine = values[:, [seeds.index(s) for s in both]]
            made[name] = tuple(both), (mine < others[:, [theirs.index(s) for s in both]]).astype(float)
    return made


def _compared(
    about: Line, direction: str, by_model: Mapping[str, Mapping[str, tuple]], first: Mapping[str, Any]
) -> list[Line]:
    """Return the lines of one metric: each model's mean, and the recipes' differences to the control."""
    from harness.analysis.statistics import holm

    control = next((label for label in by_model if first[label]["method"] == "none"), None)
    lines, tested = [], []
    for label, cells in by_model.items():
        line = dict.fromkeys(MEASURES) | about | {
            "recipe": label,
            "method": "distill" if label == control else str(first[label]["method"]),
            "profile": str(first[label]["profile"]),
            "direction": direction,
            "n_concepts": len(cells),
            "n_seeds": min(len(seeds) for seeds, _ in cells.values()),
        }  # fmt: skip
        line |= interval_of("value", _estimated([cells], lambda means: means[:, :, 0].mean(axis=(1, 2))))
        if control is not None and label != control:
            estimate = _estimated(
                [cells, by_model[control]], lambda means: (means[:, :, 0] - means[:, :, 1]).mean(axis=(1, 2))
            )
            line |= interval_of("difference", estimate)
            if label not in (UNPRUNED, PRUNED) and estimate is not None:
                tested.append((line, estimate.p_value()))
        lines.append(line)
    for (line, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        line["p"] = p
    return lines


def _estimated(
    models: Sequence[Mapping[str, tuple]], statistic: Callable[[np.ndarray], np.ndarray]
) -> statistics.Estimate | None:
    """Estimate a statistic over the concepts and seeds that all models have; None: there are none."""
    from harness.analysis import statistics

    cells, _ = stacked(models)
    return statistics.estimate(cells, statistic) if cells else None


# -- attacks -----------------------------------------------------------------------------------------------------------

AFTER, BEFORE, CONTROL_AFTER, CONTROL_BEFORE = range(4)


def attacks(rows: DataFrame) -> list[Line]:
    """Return a line for each task, set of targets (and all), attack, metric, step and recipe, by the targets' rows.

    `regained` is the share of what the recipe suppressed that the attack brings back: (after - before) / (control
    before - before), where it is shown to have suppressed anything. `difference` is after less the control after. All
    are paired by concept, prompt and seed; p-values are corrected over recipes (Holm).
    """
    grid = rows[(rows["part"] == "grid") & (rows["role"] == "target") & ~rows["defense"].isin((UNPRUNED, PRUNED))]
    lines = []
    for (task, metric), of_task in grid.groupby(["task", "metric"], sort=False, observed=True):
        for targets, kept in groups_of(of_task["protected"]):
            group = of_task[of_task["protected"].isin(kept)]
            first = {str(label): part.iloc[0] for label, part in group.groupby("defense", sort=False, observed=True)}
            before = _by_model(group[group["attack"] == ""])
            names = ["attack", "attacker", "step"]
            for place, own in group[group["attack"] != ""].groupby(names, sort=False, observed=True):
                about = {"task": task, "targets": targets, "metric": metric, **dict(zip(names, place, strict=True))}
                about |= {"step": int(about["step"]), "direction": str(group["direction"].iloc[0])}
                lines += _attacked(about, before, _by_model(own), first)
    return lines


def _attacked(
    about: Line, before: Mapping[str, Mapping[str, tuple]], after: Mapping[str, Mapping[str, tuple]],
    first: Mapping[str, Any],
) -> list[Line]:
    """Return the lines of one attack at one step by one metric."""
    from harness.analysis.statistics import holm

    control = next((label for label in after if first[label]["method"] == "none"), None)
    lines, tested = [], []
    for label, cells in after.items():
        line = dict.fromkeys(ATTACKED) | about | {
            "recipe": label, "method": "distill" if label == control else str(first[label]["method"]),
            "n_concepts": len(cells), "n_seeds": min(len(seeds) for seeds, _ in cells.values()),
        }  # fmt: skip
        lines.append(line)
        if control is None or label not in before or control not in before:
            continue
        models = [cells, before[label], after[control], before[control]]
        line |= interval_of("after", _estimated(models, partial(_mean_of, AFTER)))
        line |= interval_of("before", _estimated(models, partial(_mean_of, BEFORE)))
        line["control_after"] = _value(_estimated(models, partial(_mean_of, CONTROL_AFTER)))
        line["control_before"] = _value(_estimated(models, partial(_mean_of, CONTROL_BEFORE)))
        if label == control:
            continue
        difference = _estimated(models, partial(_gap, AFTER, CONTROL_AFTER))
        suppressed = _estimated(models, partial(_gap, CONTROL_BEFORE, BEFORE))
        line |= interval_of("difference", difference) | interval_of("suppressed", suppressed)
        if suppressed is not None and _is_shown(suppressed, line["direction"]):
            line |= interval_of("regained", _estimated(models, _regained))
        tested.append((line, None if difference is None else difference.p_value()))
    for (line, _), p_value in zip(tested, holm([p_value for _, p_value in tested]), strict=True):
        line["p"] = p_value
    return lines


def _by_model(rows: DataFrame) -> dict[str, dict[str, tuple]]:
    grouped = rows.groupby("defense", sort=False, observed=True)
    return {str(label): values_of(part) for label, part in grouped}


def _mean_of(place: int, means: np.ndarray) -> np.ndarray:
    return means[:, :, place].mean(axis=(1, 2))


def _gap(first: int, second: int, means: np.ndarray) -> np.ndarray:
    return _mean_of(first, means) - _mean_of(second, means)


def _regained(means: np.ndarray) -> np.ndarray:
    import numpy as np

    suppressed = _gap(CONTROL_BEFORE, BEFORE, means)
    undefined = np.full_like(suppressed, np.nan)  # of a resample in which nothing was suppressed
    return np.divide(_gap(AFTER, BEFORE, means), suppressed, out=undefined, where=suppressed != 0)


def _value(of: statistics.Estimate | None) -> float | None:
    return None if of is None else of.value


def _is_shown(suppressed: statistics.Estimate, direction: str) -> bool:
    """Return whether a recipe is shown to be further from the concept than the control; one seed shows nothing."""
    low, high = suppressed.interval()
    return low is not None and (high < 0 if direction == "lower" else low > 0)


def soon(lines: Sequence[Line]) -> list[Line]:
    """Return, for each attack and recipe that suppressed, the first step read at which half and 90 % are regained."""
    made: dict[tuple, Line] = {}
    for line in lines:
        if line["regained"] is None:
            continue
        place = tuple(line[name] for name in ("task", "targets", "attack", "attacker", "metric", "recipe"))
        own = made.setdefault(place, dict.fromkeys(SOON) | dict(zip(SOON, place, strict=False)))
        own["last_read_step"] = max(own["last_read_step"] or 0, line["step"])
        for name, share in (("half_step", 0.5), ("most_step", 0.9)):
            if line["regained"] >= share and (own[name] is None or line["step"] < own[name]):
                own[name] = line["step"]
    return list(made.values())


# -- cost --------------------------------------------------------------------------------------------------------------


def costs(rows: DataFrame, run: MeasuredRun) -> Iterator[Line]:
    """Yield a line for each task, set of targets and model: its size, and what its stages cost.

    Means over seeds. Seconds and memory are those of the machines that did the stages.
    """
    general = rows[rows["part"] == "general"]
    once = general[["task", "protected", "defense", "seed", "sample_key"]].drop_duplicates()
    for task, of_task in once.groupby("task", sort=False, observed=True):
        records = {key: run.store.record("replay", str(key)) for key in of_task["sample_key"].unique()}
        inputs = [record["identity"]["inputs"] for record in records.values()]
        pruned = next((each["prune"] for each in inputs if "prune" in each), None)
        sizes = run.store.record("prune", pruned)["ledger"]["numbers"] if pruned else {}
        for (protected, label), own in of_task.groupby(["protected", "defense"], sort=False, observed=True):
            found = [_cost(records[key], run) for key in own["sample_key"]]
            end = "_of_teacher" if label == UNPRUNED else ""
            yield {
                **dict.fromkeys(COST),
                "task": task,
                "targets": protected,
                "recipe": label,
                "n_seeds": len(found),
                "macs": sizes.get(f"macs{end}"),
                "macs_share": sizes[f"macs{end}"] / sizes["macs_of_teacher"] if sizes else None,
                "student_parameters": sizes.get(f"parameters{end}"),
                **{name: _mean([line.get(name) for line in found]) for name in found[0]},
            }


def _cost(record: Mapping[str, Any], run: MeasuredRun) -> Line:
    """Return what a model's drawing of general captions cost, and what the steps of its recipe did before."""
    line: Line = {"drawing_seconds": record["seconds"], "drawing_bytes": record["ledger"]["peak_memory_bytes"]}
    inputs = record["identity"]["inputs"]
    steps = [run.store.record(role, inputs[role])["ledger"] for role in ("distill", "erase") if role in inputs]
    if not steps:
        return line
    numbers = [each["numbers"] for each in steps]
    return line | {
        "training_seconds": sum(sum(each["seconds"].values()) for each in steps),
        "training_bytes": max(each["peak_memory_bytes"] for each in steps),
        "training_passes": sum(each["forward_passes"] + 2 * each["backward_passes"] for each in steps),
        "general_samples": _sum(numbers, "general_samples"),
        "concept_samples": _sum(numbers, "concept_samples"),
        "trainable_parameters": max((each.get("trainable_parameters", 0) for each in numbers), default=0) or None,
        "concept_parameters": _suppressing(inputs, numbers[-1]),
    }


def _suppressing(inputs: Mapping[str, str], last: Mapping[str, float]) -> float | None:
    """Return how many parameters the suppression may change; None for a model that is distilled only."""
    return last.get("trainable_parameters") if "erase" in inputs or last.get("concept_samples") else None


def _sum(numbers: Sequence[Mapping[str, float]], name: str) -> float | None:
    known = [each[name] for each in numbers if name in each]
    return sum(known) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
