"""Counts with their nouns."""

from __future__ import annotations

from harness.core.counted import counted


def test_one_is_singular_and_all_else_plural():
    """Also none."""
    assert [counted(n, "attack") for n in (0, 1, 2)] == ["0 attacks", "1 attack", "2 attacks"]
