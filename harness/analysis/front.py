"""Pareto front: the points that no other point dominates. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name")


def front(points: Mapping[Name, Sequence[float]]) -> list[Name]:
    """Return the names whose points no other point dominates, in order.

    More is better in every coordinate; a point dominates another when it is nowhere worse and somewhere better. Equal
    points do not dominate each other.
    """
    return [name for name, point in points.items() if not any(_dominates(o, point) for o in points.values())]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
