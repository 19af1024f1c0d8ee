"""What attacks reach: whether each works on the undefended model, and where one exceeds real images. No files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Line = Mapping[str, Any]


@dataclass(frozen=True)
class AttackVerdict:
    """Whether an attack works in a task, by every metric, at its last step."""

    task: str
    attack: str
    works: bool
    reasons: tuple[str, ...]
    """Why not, with the metric."""


def attack_verdicts(lines: Sequence[Line]) -> list[AttackVerdict]:
    """Return a verdict on each attack of the tasks that hold a defense made weak on purpose; [] without any.

    An attack works where its line of the undefended model is valid (`harness.analysis.leaderboard`): it then brings
    every target back on that model and on the weak defenses. What takes no step is not judged.
    """
    tested = {line["task"] for line in lines if line["is_weak"]}
    bare = [line for line in lines if line["task"] in tested and line["method"] == "none" and line["step"] > 0]
    found = []
    for task, attack in dict.fromkeys((line["task"], line["attack"]) for line in bare):
        own = [line for line in bare if (line["task"], line["attack"]) == (task, attack)]
        last = max(line["step"] for line in own)
        failed = tuple(
            f"{line['metric']}: {of_targets(line['reason'])}"
            for line in own
            if line["step"] == last and not line["valid"]
        )
        found.append(AttackVerdict(task, attack, not failed, failed))
    return found


def of_targets(reason: str) -> str:
    """Return those parts of a line's reason that concern `valid`, not those on innocents."""
    parts = reason.split("; ")
    return "; ".join(part for part in parts if not part.startswith("innocent ") and not part.endswith(" on innocents"))


def weak_defenses(lines: Sequence[Line]) -> list[str]:
    """Return the defenses that were made weak on purpose."""
    return list(dict.fromkeys(line["defense"] for line in lines if line["is_weak"]))


def above_real(lines: Sequence[Line]) -> list[Line]:
    """Return the lines whose attack scores better than real images of the targets."""
    return [
        line for line in lines
        if line["target_real"] is not None and _signed(line, line["target_defended"] - line["target_real"]) > 0
    ]  # fmt: skip


def above_undefended(lines: Sequence[Line]) -> list[Line]:
    """Return the lines whose attack gains more than on the undefended model: a recovery above 1."""
    return [
        line for line in lines
        if line["method"] != "none" and line["recovery"] is not None and line["recovery"] > 1
    ]  # fmt: skip


def _signed(line: Line, value: float) -> float:
    return -value if line["direction"] == "lower" else value
