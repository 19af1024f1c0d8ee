"""Check the form of SCORES, which every scoring stage writes, before the stage is committed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from harness.store.layout import SCORES


def require(folder: Path) -> None:
    """Raise ValueError if SCORES of a folder cannot be turned into rows, or has values that are not finite."""
    path = folder / SCORES
    if not path.is_file():
        return
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{SCORES} is no JSON: {error}") from None
    if not isinstance(scores, dict) or set(scores) != {"about", "values"}:
        raise ValueError(f"{SCORES} must hold 'about' and 'values', and nothing else")
    about, values = scores["about"], scores["values"]
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise ValueError(f"{SCORES}: 'about' must be a mapping of words")
    if not isinstance(values, list):
        raise ValueError(f"{SCORES}: 'values' must be a list")
    for place, entry in enumerate(values):
        _require_entry(place, entry)


def _require_entry(place: int, entry: Any) -> None:
    if not isinstance(entry, dict) or set(entry) != {"step", "prompt", "value"}:
        raise ValueError(f"{SCORES}: values[{place}] must hold step, prompt and value")
    if not _is_index(entry["step"]) or not (entry["prompt"] is None or _is_index(entry["prompt"])):
        raise ValueError(f"{SCORES}: values[{place}]: step and prompt are integers of at least 0 (prompt: or null)")
    value = entry["value"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{SCORES}: values[{place}]: the value must be a finite number (got {value!r})")


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
