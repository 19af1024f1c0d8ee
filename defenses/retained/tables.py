"""retention.csv: the ratio of what must stay, round by round. retention_knob.csv: what a bound trades. No torch.

    family   defenses of a task that differ in nothing but `retain.bound`; one without a bound, but otherwise equal,
             is beside them
    lines    of the knob: for each defense of a family, metric and step, one per attack, and one for the worst case
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from defenses.retained.collect import Immunized
from harness.contracts.table import Section

KINDS = ("class", "preserved", "general")
LABELS = ("task", "defense", "protected", "seed", "part", "bound", "by", "kept_images")
COLUMNS = (*LABELS, "round", "step_ratio", "smoothed_ratio", "multiplier", *(f"ratio_{kind}" for kind in KINDS))
KNOB_COLUMNS = (
    "task", "family", "bound", "by", "kept_images", "defense", "metric", "attack", "attacker", "step", "is_worst",
    "sgr", "sgr_low", "sgr_high", "utility", "innocent_sgr", "valid", "end_ratio", "highest_ratio",
)  # fmt: skip
OF_LEADERBOARD = (
    "metric", "attack", "attacker", "step", "sgr", "sgr_low", "sgr_high", "utility", "innocent_sgr", "valid",
)  # fmt: skip


def trajectories(found: Iterable[Immunized]) -> list[dict[str, Any]]:
    """Return the lines of retention.csv."""
    return [
        {
            **dict.fromkeys(COLUMNS),
            "task": each.task,
            "defense": each.defense,
            "protected": "+".join(each.protected),
            "seed": each.seed,
            "bound": each.bound,
            "by": each.retain["by"],
            "kept_images": "+".join(each.retain["images"]),
            **{"step_ratio" if name == "ratio" else name: value for name, value in row.items()},
            "part": int(row.get("part", 0)),
            "round": int(row["round"]),
        }
        for each in found
        for row in each.curve
    ]


def summaries(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each training: its labels, rounds, last and highest smoothed ratio, rounds above, last multiplier."""
    grouped: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in lines:
        grouped.setdefault(tuple(line[name] for name in LABELS), []).append(line)
    return [
        {
            **dict(zip(LABELS, labels, strict=True)),
            "rounds": len(own),
            "end_ratio": own[-1]["smoothed_ratio"],
            "highest_ratio": max(line["smoothed_ratio"] for line in own),
            "above": sum(line["smoothed_ratio"] > line["bound"] for line in own) / len(own),
            "multiplier": own[-1]["multiplier"],
        }
        for labels, own in grouped.items()
    ]


def families(found: Sequence[Immunized]) -> list[tuple[str, dict[str, Immunized]]]:
    """Return (name, defense -> one of its models) of each family with at least two bounds, by bound; no bound is last.

    The name is the common beginning of the defenses' names.
    """
    grouped: dict[tuple[str, str], dict[str, Immunized]] = {}
    free: dict[tuple[str, str], dict[str, Immunized]] = {}
    for each in found:
        if each.retain is None:
            free.setdefault((each.task, each.others), {}).setdefault(each.defense, each)
        else:
            grouped.setdefault((each.task, each.settings), {}).setdefault(each.defense, each)
    made = []
    for own in grouped.values():
        if len({each.bound for each in own.values()}) < 2:
            continue
        first = next(iter(own.values()))
        name = os.path.commonprefix(list(own)).rstrip("0123456789_-.") or first.method
        ordered = sorted(own.items(), key=lambda item: item[1].bound)
        made.append((name, dict([*ordered, *free.get((first.task, first.others), {}).items()])))
    return made


def knob(
    found: Sequence[Immunized],
    summary: Sequence[Mapping[str, Any]],
    leaderboard: Sequence[Mapping[str, Any]],
    worst: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return the lines of retention_knob.csv: those of each attack, then those of the worst case."""
    made = []
    for name, members in families(found):
        task = next(iter(members.values())).task
        settings = next(each.retain for each in members.values() if each.retain is not None)
        for is_worst, lines in ((False, leaderboard), (True, worst)):
            for defense, each in members.items():
                own = [line for line in summary if (line["task"], line["defense"]) == (task, defense)]
                about = {
                    "task": task,
                    "family": name,
                    "bound": each.bound,
                    "by": settings["by"],
                    "kept_images": "+".join(settings["images"]),
                    "defense": defense,
                    "is_worst": is_worst,
                    "end_ratio": _mean([line["end_ratio"] for line in own]),
                    "highest_ratio": _mean([line["highest_ratio"] for line in own]),
                }
                made += [
                    {**about, **{column: line[column] for column in OF_LEADERBOARD}}
                    for line in lines
                    if (line["task"], line["defense"]) == (task, defense)
                ]
    return made


def sections(summary: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Return retention.md: whether each bound was kept, then what it trades at the last step."""
    found = [Section("Bounds on what must stay", level=1), _kept(summary)]
    for task, family, metric in dict.fromkeys((x["task"], x["family"], x["metric"]) for x in lines):
        own = [line for line in lines if (line["task"], line["family"], line["metric"]) == (task, family, metric)]
        last = max(line["step"] for line in own)
        found.append(
            Section(
                f"What a bound trades: {task}, {family}, {metric}, step {last}",
                headers=("bound", "attack", "SGR", "95 %", "utility", "innocents' SGR", "ratio at the end"),
                rows=[_texts(line) for line in own if line["step"] == last],
                alignments="rlrrrrr",
            )
        )
    return found


def _kept(summary: Sequence[Mapping[str, Any]]) -> Section:
    names = ("task", "defense", "protected", "bound", "by", "kept_images")
    grouped: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in summary:
        grouped.setdefault(tuple(line[name] for name in names), []).append(line)
    rows = [
        [
            *(str(label) for label in labels),
            str(len(own)),
            *(f"{_mean([line[c] for line in own]):.3f}" for c in ("end_ratio", "highest_ratio")),
            f"{100 * _mean([line['above'] for line in own]):.0f}",
            f"{_mean([line['multiplier'] for line in own]):.3g}",
        ]
        for labels, own in grouped.items()
    ]
    return Section(
        "Was the bound kept?",
        text=("Smoothed ratios of the loss on what must stay, means over trainings (seeds, and parts of `merged`).",),
        headers=(*names, "trainings", "at the end", "highest", "rounds above %", "multiplier"),
        rows=rows,
        alignments="lllrll" + "r" * 5,
    )


def _texts(line: Mapping[str, Any]) -> list[str]:
    attack = f"{line['attack']}{', adaptive' if line['attacker'] == 'adaptive' else ''}"
    interval = "–" if line["sgr_low"] is None else f"{line['sgr_low']:.3f} to {line['sgr_high']:.3f}"
    numbers = [_text(line[name]) for name in ("utility", "innocent_sgr", "end_ratio")]
    bound = "none" if line["bound"] is None else f"{line['bound']:g}"
    return [bound, f"worst: {attack}" if line["is_worst"] else attack, _text(line["sgr"]), interval, *numbers]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
