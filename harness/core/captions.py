"""Caption lists: text files with one caption per line, shipped with the suites or given by path. No torch here."""

from __future__ import annotations

import random
from pathlib import Path

from harness.core.paths import SUITES


def path(name: str) -> Path:
    """Return the file of a list; `name` is a bundled list, else a path."""
    bundled = SUITES / f"{name}.txt"
    return bundled if bundled.is_file() else Path(name)


def read(name: str, count: int | None = None, seed: int | None = None) -> list[str]:
    """Return the captions of a list, or `count` of them: the first ones, or a random draw when `seed` is given.

    Raises ValueError when the list is empty.
    """
    captions = [line.strip() for line in path(name).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not captions:
        raise ValueError(f"caption list '{name}' is empty")
    count = min(count or len(captions), len(captions))
    return captions[:count] if seed is None else random.Random(seed).sample(captions, count)
