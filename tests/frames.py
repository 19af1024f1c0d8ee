"""Rows that tests write down one by one, as the DataFrame that the harness works on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from harness.results.rows import frame

if TYPE_CHECKING:
    from pandas import DataFrame


def frame_of(rows: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Return rows as a table; what a row leaves out is empty, its prompt 0."""
    parts = []
    for row in rows:
        prompt = row.get("prompt_index", 0)
        labels = {name: value for name, value in row.items() if name not in ("step", "prompt_index", "value")}
        if "prompt" in row:
            labels["prompt"] = [row["prompt"]] * (prompt + 1)
        entry = {"step": row["step"], "prompt": prompt, "value": row["value"]}
        parts.append((labels, {"about": {}, "values": [entry]}))
    return frame(parts)
