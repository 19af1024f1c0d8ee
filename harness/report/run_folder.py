"""A run folder, read for the report: its rows, its suite, and the trials whose images are shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.analysis.leaderboard import Gates
from harness.analysis.measurements import Measurements
from harness.core.errors import UserMistake, one_line
from harness.results import folder
from harness.results.folder import RESOLVED, read_suite
from harness.results.rows import read_rows
from harness.store import opening
from harness.store.store import Store
from harness.suite.spec import DEFAULT_TASK

if TYPE_CHECKING:
    from pandas import DataFrame, Series

_KEY = re.compile(r"[0-9a-f]{32}")

TrialName = tuple[str, str, str, str, str, str, str]
"""(task, defense, attack, attacker, protected set, concept, role)."""


@dataclass
class Drawn:
    """The images of one trial in the displayed seed, and the score of each prompt."""

    sample: str  # key of the sample stage; for role "real" of the images stage
    prompts: dict[int, str] = field(default_factory=dict)
    scores: dict[tuple[int, int, str], float] = field(default_factory=dict)  # (step, prompt, metric) -> value


@dataclass
class RunFolder:
    """All data for the report."""

    path: Path
    suite: dict[str, Any]
    suite_text: str
    gates: Gates
    table: Measurements
    """The rows of immunization tasks."""
    about: dict[str, Mapping[str, Any]]
    """metric -> its first row, which describes the score; metrics of `table` first, then of other kinds of tasks."""
    rows: int
    """Number of rows of all tasks."""
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
    """Read a run folder. Raises UserMistake if it is not one, or was written by another program."""
    text, suite = read_suite(path)
    try:
        seed = int(suite["seeds"][0])
        gates = Gates(**suite["gates"])
    except (KeyError, IndexError, TypeError, ValueError):
        what = "no seeds or gates in it; write it anew with `table`"
        raise UserMistake(f"{one_line(path / RESOLVED)}: {what}") from None
    rows = read_rows(path)
    is_other = rows["task"].isin(_of_other_kinds(suite))
    own, other = rows[~is_other], rows[is_other].drop_duplicates("metric")
    table = Measurements(own)
    others = {line["metric"]: line for line in other.to_dict("records") if line["metric"] not in table.about}
    return RunFolder(
        path=path,
        suite=suite,
        suite_text=text,
        gates=gates,
        table=table,
        about=table.about | others,
        rows=len(rows),
        seed=seed,
        drawn=_drawn(own, seed),
        scores=_keys(rows["score_key"]),
        store=opening.at(path.parent / "store"),
        is_whole=folder.is_whole(path),
        failures=folder.failures(path),
    )


def _of_other_kinds(suite: Mapping[str, Any]) -> list[str]:
    """Return the tasks of other kinds than immunization, which have other labels and tables."""
    tasks = suite.get("tasks")
    entries = {str(n): e for n, e in tasks.items() if isinstance(e, dict)} if isinstance(tasks, dict) else {}
    return [name for name, entry in entries.items() if entry.get("kind", DEFAULT_TASK) != DEFAULT_TASK]


def _keys(column: Series) -> list[str]:
    """Return the valid stage keys in a column, in order; other values could be paths outside the store."""
    return [text for text in column.unique() if _KEY.fullmatch(text)]


def _drawn(rows: DataFrame, seed: int) -> dict[TrialName, Drawn]:
    """Return the trials whose images are shown: those of one seed, and real images of any seed."""
    is_real = rows["role"] == "real"
    is_shown = rows["role"].isin(("target", "innocent")) & (rows["seed"] == seed)
    shown = rows[(is_shown | is_real) & rows["sample_key"].isin(_keys(rows["sample_key"]))]
    drawn: dict[TrialName, Drawn] = {}
    columns = ["task", "defense", "attack", "attacker", "protected", "concept", "role"]
    for name, own in shown.groupby(columns, sort=False, observed=True):
        trial = drawn[name] = Drawn(own["sample_key"].iloc[0])
        asked = own[own["prompt_index"].notna()]
        if name[-1] == "real" or asked.empty:
            continue
        prompts = asked["prompt_index"].astype(int).tolist()
        trial.prompts = dict(zip(prompts, asked["prompt"].tolist(), strict=True))
        places = zip(asked["step"].tolist(), prompts, asked["metric"].tolist(), strict=True)
        trial.scores = dict(zip(places, asked["value"].tolist(), strict=True))
    return drawn
