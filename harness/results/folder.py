"""Read a run folder: its resolved suite, whether its tables are complete, and its failures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from harness.analysis.leaderboard import Gates
from harness.core.errors import UserMistake, one_line
from harness.results import tables
from harness.suite.resolved import RESOLVED


def read_suite(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return text and content of a run's suite. Raises UserMistake for a folder without one."""
    file = folder / RESOLVED
    try:
        text = file.read_text(encoding="utf-8")
        suite = yaml.safe_load(text)
    except OSError:
        what = f"there is no {RESOLVED}; name the folder of a run, such as runs/quickstart"
        raise UserMistake(f"{one_line(folder)}: {what}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserMistake(f"{one_line(file)}: {one_line(error)}; write it anew with `table`") from None
    if not isinstance(suite, dict):
        raise UserMistake(f"{one_line(file)}: not a suite; write it anew with `table`")
    return text, suite


def is_whole(folder: Path) -> bool:
    """Return whether the tables contain every row of the plan."""
    try:
        return json.loads((folder / tables.STATE).read_text(encoding="utf-8"))["is_whole"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def failures(folder: Path) -> list[tuple[str, str]]:
    """Return (stage, error) of the stages that failed in the last run; not of stages of other grids of that name."""
    found, others = [], tables.others(folder)
    for file in sorted((folder / tables.FAILURES).glob("*.json")):
        if file.stem in others:
            continue
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            found.append((str(record["label"]), str(record["error"])))
        except (OSError, ValueError, KeyError, TypeError):
            found.append((file.stem, "its record cannot be read"))
    return found


def read_gates(folder: Path) -> Gates:
    """Return the gates of a run's suite. Raises UserMistake where there are none."""
    return gates_of(read_suite(folder)[1], folder)


def gates_of(suite: Mapping[str, Any], folder: Path) -> Gates:
    """Return the gates of a resolved suite. Raises UserMistake, which names the folder, where there are none."""
    try:
        return Gates(**suite["gates"])
    except (KeyError, TypeError):
        what = "no gates in it; write it anew with `table`"
        raise UserMistake(f"{one_line(folder / RESOLVED)}: {what}") from None
