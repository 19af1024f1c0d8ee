"""The content of the report's sections, from the leaderboard's lines. No file access, no HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.analysis.claims import FRONT, Headline, Standing
from harness.analysis.leaderboard import interval
from harness.analysis.measurements import Measurements, Trial
from harness.results.headline import rank_text
from harness.results.leaderboard import SHOWN, TEXT, cells

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table of the page."""

    name: str
    header: str
    is_text: bool
    meaning: str = ""


@dataclass(frozen=True)
class Entry:
    """A cell of a table: its text, and its sorting key."""

    text: str
    order: str


@dataclass(frozen=True)
class TableLine:
    """A line of the leaderboard in the form that the page shows."""

    line: Line
    entries: list[Entry]


def columns(definitions: Mapping[str, str]) -> list[Column]:
    """Return the columns of the leaderboard: those of leaderboard.md, the metric, and the validity for innocents."""
    defined = {"interval": "sgr_low", "rank": "rank_low"}
    listed = [
        Column(name, header, name in TEXT, definitions.get(defined.get(name, name), "")) for name, header in SHOWN
    ]  # fmt: skip
    listed.insert(3, Column("metric", "metric", True, definitions.get("metric", "")))
    return listed


def table_line(line: Line) -> TableLine:
    """Return a line with its cells in the order of `columns`."""
    entries = [
        Entry(text, _order(line, name)) for (name, _), text in zip(SHOWN, cells(dict(line)), strict=True)
    ]  # fmt: skip
    entries.insert(3, Entry(line["metric"], line["metric"]))
    return TableLine(line, entries)


def _order(line: Line, column: str) -> str:
    if column == "rank":
        return "" if line["rank_low"] is None else str(line["rank_low"] + line["rank_high"])
    value = line["sgr_low"] if column == "interval" else line[column]
    if column == "interval" and line["method"] == "none":
        value = None
    if isinstance(value, bool):
        return "1" if value else "0"
    return "" if value is None else str(value)


def tasks(lines: Sequence[Line]) -> list[str]:
    """Return the tasks in order."""
    return list(dict.fromkeys(line["task"] for line in lines))


def distinct(lines: Iterable[Line], column: str) -> list[Any]:
    """Return the values of a column in order of first appearance."""
    return list(dict.fromkeys(line[column] for line in lines))


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; without one (a single seed) the limits are None."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class InShort:
    """A defense in one line: the closest attack at the shown step, and the cost of the defense."""

    defense: str
    attack: str
    attacker: str
    before: float | None
    undefended: float | None
    defended: float
    real: float | None
    sgr: Interval | None
    rank: str
    rank_order: int | None
    """What ranks are sorted by."""
    retention: Interval | None
    utility: float | None
    valid: bool
    place: str
    """See `harness.analysis.claims`."""
    is_starred: bool
    """Whether it is on the front beyond chance, and not the undefended model."""


@dataclass(frozen=True)
class Point:
    """A defense in the immunity-retention plane: for one attack, or for the worst case over attacks."""

    defense: str
    attack: str  # "": the worst case
    retention: Interval
    immunity: Interval
    valid: bool


@dataclass
class Plane:
    """A task and one metric at the shown step."""

    task: str
    metric: str
    step: int
    why: str
    points: list[Point] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)
    """Place (see `harness.analysis.claims`) -> defenses."""

    @property
    def front(self) -> list[str]:
        """The defenses that are on the front beyond chance."""
        return self.places.get(FRONT, [])


def plane_of(headline: Headline) -> Plane:
    """Return the plane of a task and metric; without points where no innocents count.

    Immunity: SGR on targets; for the worst case, that of the closest attack. Retention: 1 - SGR on innocents, mean over
    the attacks that are valid on innocents (not those that learn nothing on the undefended model).
    """
    plane = Plane(headline.task, headline.metric, headline.step, headline.why)
    has_worst = len(distinct(headline.lines, "attack")) > 1
    for standing in headline.standings:
        defense = standing.line["defense"]
        if standing.place:
            plane.places.setdefault(standing.place, []).append(defense)
        plane.points += [
            Point(defense, line["attack"], _kept(line), _sgr(line), line["valid"])
            for line in headline.lines
            if line["defense"] == defense and line["innocent_valid"] and line["sgr"] is not None
        ]
        retention, immunity = _retention(standing), _sgr(standing.line)
        if has_worst and retention and immunity:
            plane.points.append(Point(defense, "", retention, immunity, standing.line["valid"]))
    return plane


def _sgr(line: Line) -> Interval | None:
    """Return the SGR of a line; the undefended model's is 0 by definition, and has no interval."""
    if line["sgr"] is None:
        return None
    return Interval(line["sgr"]) if line["method"] == "none" else Interval(*(line[f"sgr{end}"] for end in ENDS))


def _kept(line: Line) -> Interval:
    value, low, high = (line[f"innocent_sgr{end}"] for end in ENDS)
    has_none = low is None or line["method"] == "none"
    return Interval(1 - value) if has_none else Interval(1 - value, 1 - high, 1 - low)


def _retention(standing: Standing) -> Interval | None:
    if standing.retention is None:
        return None
    if standing.line["method"] == "none":
        return Interval(standing.retention)
    return Interval(standing.retention, standing.retention_low, standing.retention_high)


ENDS = ("", "_low", "_high")


def in_short(headline: Headline) -> list[InShort]:
    """Return a line for each defense of a headline, the best valid protection first."""
    return [_in_short(standing) for standing in headline.standings]


def _in_short(standing: Standing) -> InShort:
    line = standing.line
    return InShort(
        defense=line["defense"],
        attack=line["attack"],
        attacker=line["attacker"],
        before=line["target_before"],
        undefended=line["target_none"],
        defended=line["target_defended"],
        real=line["target_real"],
        sgr=_sgr(line),
        rank=rank_text(line),
        rank_order=None if line["rank_low"] is None else line["rank_low"] + line["rank_high"],
        retention=_retention(standing),
        utility=line["utility"],
        valid=line["valid"],
        place=standing.place,
        is_starred=standing.place == FRONT and line["method"] != "none",
    )


@dataclass(frozen=True)
class Reason:
    """A reason why lines are not valid, and these lines."""

    text: str  # numbers that differ between lines are given as a range
    of_innocents: bool  # applies only to innocent concepts
    where: list[str]


def reasons(lines: Sequence[Line], task: str) -> list[Reason]:
    """Return each reason of a task once, those on targets first, with the lines that it applies to."""
    found: dict[str, list[tuple[str, Line]]] = {}
    for line in lines:
        if line["task"] == task:
            for text in filter(None, line["reason"].split("; ")):
                found.setdefault(_NUMBER.sub("#", text), []).append((text, line))
    made = []
    for cases in found.values():
        texts = list(dict.fromkeys(text for text, _ in cases))
        own: dict[str, list[tuple[int, str]]] = {}
        for text, line in cases:
            where = f"{line['defense']}, {line['attack']}, {line['metric']}"
            own.setdefault(where, []).append((line["step"], text))
        summed = _ranged(texts)
        of_innocents = summed.startswith("innocent ") or summed.endswith(" trials on innocents")
        listed = [_placed(where, said, len(texts) > 1) for where, said in own.items()]
        made.append(Reason(summed, of_innocents, listed))
    return sorted(made, key=lambda reason: reason.of_innocents)


_NUMBER = re.compile(r"(?<![\w:-])-?\d+(?:\.\d+)?(?!\w)")


def _ranged(texts: Sequence[str]) -> str:
    """Return one text, with ranges, for texts that differ only in numbers."""
    columns = list(zip(*(_NUMBER.findall(text) for text in texts), strict=True))
    ranges = iter(
        found[0] if len(set(found)) == 1 else f"{min(found, key=float)} to {max(found, key=float)}" for found in columns
    )
    return _NUMBER.sub(lambda match: next(ranges), texts[0])


def _placed(where: str, said: Sequence[tuple[int, str]], with_numbers: bool) -> str:
    if not with_numbers:
        return f"{where} at {_steps([step for step, _ in said])}"
    return f"{where}: " + "; ".join(
        f"step {step}: {', '.join(_NUMBER.findall(text))}" for step, text in dict.fromkeys(said)
    )


def _steps(steps: Sequence[int]) -> str:
    listed = sorted(set(steps))
    return ("step " if len(listed) == 1 else "steps ") + ", ".join(map(str, listed))


@dataclass(frozen=True)
class CurvePoint:
    """The score of a defense's images at a step: mean over seeds, with its interval."""

    step: int
    mean: float
    low: float | None
    high: float | None


@dataclass
class ConceptCurves:
    """Recovery of one concept by one metric: attack -> defense -> points by step, and reference levels."""

    task: str
    concept: str
    role: str
    metric: str
    attacks: dict[str, dict[str, list[CurvePoint]]]
    real: float | None
    original: float | None
    """The level of the model before erasure."""


def concept_curves(table: Measurements) -> list[ConceptCurves]:
    """Return the curves of every concept and metric; for innocents, means over their protected sets."""
    made: dict[tuple[str, str, str, str], ConceptCurves] = {}
    steps: dict[tuple[str, str, str, str], list[int]] = {}
    for task, attack, attacker, metric, step in table.groups:
        if step > 0:  # an attack that takes no step has no curve
            steps.setdefault((task, metric, attack, attacker), []).append(step)
    for (task, metric, attack, attacker), read in steps.items():
        for role in ("target", "innocent"):
            for defense in table.defenses[task]:
                _add_curves(made, table, (task, metric, role), (attack, attacker, sorted(read)), defense)
    order = {"target": 0, "innocent": 1}
    return sorted(made.values(), key=lambda c: (_place(table, c.task), order[c.role]))


def _place(table: Measurements, task: str) -> int:
    """Return the position of a task in the rows."""
    return list(table.defenses).index(task)


def _add_curves(made, table: Measurements, about: tuple, attacked: tuple, defense: str) -> None:
    (task, metric, role), (attack, attacker, steps) = about, attacked
    found = {step: table.means(task, defense, attack, attacker, metric, step, role) for step in steps}
    before = table.means(task, defense, "", "", metric, 0, role)
    for concept in dict.fromkeys(c for values in found.values() for _, c, _ in values):
        points = [_point(0, before, concept), *(_point(step, found[step], concept) for step in steps)]
        key = (task, role, concept, metric)
        if key not in made:
            real = _mean_of(table.means(task, "", "", "", metric, 0, "real"), concept)
            original = _mean_of(table.means(task, "original", "", "", metric, 0, role), concept)
            made[key] = ConceptCurves(task, concept, role, metric, {}, real, original)
        made[key].attacks.setdefault(attack, {})[defense] = [p for p in points if p is not None]


def _point(step: int, values: Mapping[Trial, float], concept: str) -> CurvePoint | None:
    by_seed: dict[int, list[float]] = {}
    for (_, name, seed), value in values.items():
        if name == concept:
            by_seed.setdefault(seed, []).append(value)
    means = [math.fsum(listed) / len(listed) for listed in by_seed.values()]
    if not means:
        return None
    return CurvePoint(step, math.fsum(means) / len(means), *interval(means))


def _mean_of(values: Mapping[Trial, float], concept: str) -> float | None:
    own = [value for (_, name, _), value in values.items() if name == concept]
    return math.fsum(own) / len(own) if own else None
