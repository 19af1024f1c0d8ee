"""A run folder, read for the report: its rows, its suite, and the trials whose images are shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.analysis.leaderboard import Gates
from harness.analysis.measurements import Measurements
from harness.core.errors import UserMistake, one_line
from harness.results.rows import read_rows
from harness.results.tables import STATE
from harness.store.store import Store

RESOLVED = "suite.resolved.yaml"
_KEY = re.compile(r"[0-9a-f]{32}")

TrialName = tuple[str, str, str, str, str, str, str]
"""(task, defense, attack, attacker, protected set, concept, role)."""


@dataclass
class Drawn:
    """What one trial drew in the seed that is shown, and how each prompt scored."""

    sample: str  # key of the sample stage; of the images stage for role "real"
    prompts: dict[int, str] = field(default_factory=dict)
    scores: dict[tuple[int, int, str], float] = field(default_factory=dict)  # (step, prompt, metric) -> value


@dataclass
class RunFolder:
    """All that a report is made from."""

    path: Path
    suite: dict[str, Any]
    suite_text: str
    gates: Gates
    table: Measurements
    rows: int
    seed: int
    """The seed whose images are shown: the suite's first."""
    drawn: dict[TrialName, Drawn]
    scores: list[str]
    """Keys of all score stages behind the rows."""
    store: Store
    is_whole: bool
    failures: list[tuple[str, str]]
    """(stage, error)."""


def read(path: Path) -> RunFolder:
    """Read a run folder. Raises UserMistake when it is none, or was written by something else."""
    text, suite = _suite(path)
    try:
        seed = int(suite["seeds"][0])
        gates = Gates(**suite["gates"])
    except (KeyError, IndexError, TypeError, ValueError):
        what = "no seeds or gates in it; write it anew with `table`"
        raise UserMistake(f"{one_line(path / RESOLVED)}: {what}") from None
    drawn: dict[TrialName, Drawn] = {}
    scores: dict[str, None] = {}
    count = 0

    def noted() -> Iterator[Mapping[str, str]]:
        nonlocal count
        for row in read_rows(path):
            count += 1
            if _KEY.fullmatch(row["score_key"]):
                scores[row["score_key"]] = None
            _note(row, seed, drawn)
            yield row

    table = Measurements(noted())
    return RunFolder(
        path=path,
        suite=suite,
        suite_text=text,
        gates=gates,
        table=table,
        rows=count,
        seed=seed,
        drawn=drawn,
        scores=list(scores),
        store=Store(path.parent / "store"),
        is_whole=_is_whole(path),
        failures=_failures(path),
    )


def _note(row: Mapping[str, str], seed: int, drawn: dict[TrialName, Drawn]) -> None:
    """Keep a row of the shown seed for the image sheets."""
    is_real = row["role"] == "real"
    if row["role"] not in ("target", "innocent", "real") or not _KEY.fullmatch(row["sample_key"]):
        return
    if int(row["seed"]) != seed and not is_real:
        return
    columns = ("task", "defense", "attack", "attacker", "protected", "concept", "role")
    trial = drawn.setdefault(tuple(row[c] for c in columns), Drawn(row["sample_key"]))
    if is_real or not row["prompt_index"].isascii() or not row["prompt_index"].isdigit():
        return
    prompt = int(row["prompt_index"])
    trial.prompts[prompt] = row["prompt"]
    trial.scores[int(row["step"]), prompt, row["metric"]] = float(row["value"])


def _suite(path: Path) -> tuple[str, dict[str, Any]]:
    file = path / RESOLVED
    try:
        text = file.read_text(encoding="utf-8")
        suite = yaml.safe_load(text)
    except OSError:
        what = f"there is no {RESOLVED}; name the folder of a run, such as runs/quickstart"
        raise UserMistake(f"{one_line(path)}: {what}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserMistake(f"{one_line(file)}: {one_line(error)}; write it anew with `table`") from None
    if not isinstance(suite, dict):
        raise UserMistake(f"{one_line(file)}: not a suite; write it anew with `table`")
    return text, suite


def _is_whole(path: Path) -> bool:
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))["is_whole"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _failures(path: Path) -> list[tuple[str, str]]:
    found = []
    for file in sorted((path / "failures").glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            found.append((str(record["label"]), str(record["error"])))
        except (OSError, ValueError, KeyError, TypeError):
            found.append((file.stem, "its record cannot be read"))
    return found
