"""Caption lists: text files with one caption a line, shipped with the suites or given by path. No torch here."""

from __future__ import annotations

import importlib.resources
import random
from pathlib import Path


def path(name: str) -> Path:
    """Return the file of a list: of a bundled one by its name, else `name` as a path."""
    bundled = Path(str(importlib.resources.files("suites"))) / f"{name}.txt"
    return bundled if bundled.is_file() else Path(name)


def read(name: str, count: int | None = None, seed: int | None = None) -> list[str]:
    """Return the captions of a list; `count` of them, the first or those drawn under `seed`.

    Raises ValueError when there are none.
    """
    captions = [line.strip() for line in path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not captions:
        raise ValueError(f"caption list '{name}' is empty")
    count = min(count or len(captions), len(captions))
    return captions[:count] if seed is None else random.Random(seed).sample(captions, count)
