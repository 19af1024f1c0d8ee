"""Numbers of things in messages and titles: "1 seed", "2 seeds"."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, whose plural ends in "s"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
