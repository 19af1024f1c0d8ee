"""The cost of an adaptation under each defense. No torch here.

One line per task, defense and attack, from the records of finished adaptations. `LEGEND` explains what is measured,
`harness.analysis.definitions` defines the columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.contracts.table import Section, Table

if TYPE_CHECKING:
    from harness.contracts.task import Measurement
    from harness.plan.graph import Plan
    from harness.store.store import Store

COLUMNS = (
    "task", "defense", "attack", "attacker", "n_adaptations", "trained_parameters", "trained_bytes", "optimizer_bytes",
    "peak_memory_bytes", "seconds_per_step", "trained_ratio", "peak_memory_ratio", "time_ratio",
)  # fmt: skip
"""Ratios are relative to the undefended model's adaptations of the same concepts and seeds, where both are done."""
_RATIOS = {
    "trained_ratio": "trained_parameters",
    "peak_memory_ratio": "peak_memory_bytes",
    "time_ratio": "seconds_per_step_alone",
}
_ALONE = _RATIOS["time_ratio"]
HEADERS = (
    "defense", "trained weights, MB", "optimizer, MB", "peak memory, MB", "s / step", "of undefended: weights",
    "memory", "time",
)  # fmt: skip
LEGEND = (
    "From the records of a run, a line for each task, defense and attack: means over its adaptations. Bytes of trained "
    "weights and of the optimizer's states are counted; gradients take as many as the weights. Peak memory is the "
    "device's, reported on GPUs only. Seconds a step are training alone, without loading, encoding and saving; their "
    "ratio is reported where stages had their device to themselves: on GPUs, or one after the other "
    "(`--executor serial`). Stages that trials share (of attackers whom a defense does not affect) are the same ones."
)


def records(plan: Plan, store: Store) -> dict[str, Mapping[str, Any]]:
    """Return the records of finished adaptations, by key; without those that have no ledger of costs."""
    keys = dict.fromkeys(key for _, key in _adapted(plan))
    done = {key: store.record("adapt", key) for key in keys if store.has("adapt", key)}
    return {key: record for key, record in done.items() if "ledger" in record}


def _adapted(plan: Plan) -> Iterator[tuple[Measurement, str]]:
    """Yield (measurement, key of its adaptation) for measurements on adapted models, in tasks that name attacks."""
    for measurement in plan.measurements:
        read = plan.stages[measurement.observed].inputs.get("adapt")
        labels = measurement.labels
        # what an adaptation shows of something else is another look at it, not another adaptation
        if read is not None and "attack" in labels and labels.get("role") != "relapse":
            yield measurement, read.key


def lines(plan: Plan, done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of adaptation_cost.csv; `done` are the `records`."""
    made: dict[tuple, dict[tuple, str]] = {}  # line -> adaptation (protected set, concept, seed) -> key
    undefended: dict[tuple, tuple] = {}
    costs: dict[str, dict[str, float | None]] = {}
    for measurement, key in _adapted(plan):
        about = measurement.labels
        name = (about["task"], about["defense"], about["attack"], about["attacker"])
        if about["method"] == "none":
            undefended[about["task"], about["attack"], about["attacker"]] = name
        if key in done:
            costs[key] = _cost(done[key], measurement.steps[-1])
            made.setdefault(name, {})[about["protected"], about["concept"], about["seed"]] = key
    result = []
    for name, own in made.items():
        task, _, attack, attacker = name
        base = made.get(undefended.get((task, attack, attacker), ()), {})
        pairs = dict.fromkeys((key, base[adapted]) for adapted, key in own.items() if adapted in base)
        left, right = ([costs[pair[side]] for pair in pairs] for side in (0, 1))
        line = dict(zip(COLUMNS, name, strict=False))
        keys = dict.fromkeys(own.values())
        found = {**line, "n_adaptations": len(keys), **_mean([costs[k] for k in keys]), **_ratios(left, right)}
        result.append({column: found[column] for column in COLUMNS})
    return result


def _ratios(own: Sequence[Mapping[str, float | None]], base: Sequence[Mapping[str, float | None]]) -> dict:
    """Return the ratios of means over paired adaptations; None where there are no pairs, or a number is not known."""
    if not own:
        return dict.fromkeys(_RATIOS)
    means, of_base = _mean(own), _mean(base)
    return {
        ratio: means[column] / of_base[column] if means[column] is not None and of_base[column] else None
        for ratio, column in _RATIOS.items()
    }


def _cost(record: Mapping[str, Any], steps: int) -> dict[str, float | None]:
    ledger, provenance = record["ledger"], record["provenance"]
    numbers, seconds = ledger["numbers"], ledger["seconds"].get("train", 0.0) / steps
    is_cpu = provenance["device"] == "cpu"
    return {
        "trained_parameters": numbers.get("trainable_parameters"),
        "trained_bytes": numbers.get("trained_bytes"),
        "optimizer_bytes": numbers.get("optimizer_bytes"),
        "peak_memory_bytes": None if is_cpu else ledger["peak_memory_bytes"],
        "seconds_per_step": seconds,
        _ALONE: None if is_cpu and provenance["executor"] != "serial" else seconds,
    }


def _mean(costs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of each number that all adaptations have."""
    found = {}
    for column in costs[0]:
        values = [cost[column] for cost in costs]
        found[column] = None if None in values else sum(values) / len(values)
    return found


def table(costs: Sequence[Mapping[str, Any]]) -> Table:
    """Return adaptation_cost.csv and .md, which has a table for each task and attack."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in costs:
        groups.setdefault((line["task"], line["attack"], line["attacker"]), []).append(line)
    sections = [Section("What adaptations cost", (LEGEND,), level=1)]
    for (task, attack, attacker), own in groups.items():
        rows = [_cells(line) for line in own]
        sections.append(Section(f"{task}: {attack}, {attacker} attacker", headers=HEADERS, rows=rows))
    return Table("adaptation_cost", COLUMNS, costs, sections)


def _cells(line: Mapping[str, Any]) -> list[str]:
    sizes = [line[column] for column in ("trained_bytes", "optimizer_bytes", "peak_memory_bytes")]
    return [
        line["defense"],
        *("–" if size is None else f"{size / 1e6:.1f}" for size in sizes),
        f"{line['seconds_per_step']:.3f}",
        *("–" if line[ratio] is None else f"{line[ratio]:.2f}" for ratio in _RATIOS),
    ]
