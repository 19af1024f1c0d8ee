"""A run for use in notebooks: rows and tables as DataFrames, images by labels, comparisons."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserMistake, did_you_mean, one_line
from harness.results import folder as run_folder
from harness.results.cells import from_cell
from harness.results.rows import read_rows
from harness.store import opening
from harness.store.layout import step_folder

if TYPE_CHECKING:
    from pandas import DataFrame

IMAGE_LABELS = (
    "task", "defense", "attack", "attacker", "protected", "concept", "role", "seed", "step", "prompt_index", "prompt",
)  # fmt: skip
"""Columns of rows by which images are selected."""
_TABLE = re.compile(r"[a-z0-9_]{1,60}")
_KEY = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class LoadedRun:
    """The results of a run. Each part is read on first use, and kept.

    Tables have the content of the files; empty cells are NaN in number columns and "" in text columns. All properties
    raise UserMistake if a file is missing or damaged.
    """

    folder: Path
    """Such as runs/quickstart."""

    def __post_init__(self) -> None:
        run_folder.read_suite(self.folder)

    @cached_property
    def suite(self) -> dict[str, Any]:
        """The resolved suite, with defaults and overrides."""
        return run_folder.read_suite(self.folder)[1]

    @property
    def is_whole(self) -> bool:
        """Whether the tables contain every row of the plan."""
        return run_folder.is_whole(self.folder)

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(stage, error) of the stages that failed in the last run."""
        return run_folder.failures(self.folder)

    @cached_property
    def rows(self) -> DataFrame:
        """One row for each trial, step, prompt and metric; text columns are categorical."""
        return read_rows(self.folder)

    @property
    def tables(self) -> list[str]:
        """The names that `table` takes."""
        return sorted(path.stem for path in self.folder.glob("*.csv") if _TABLE.fullmatch(path.stem))

    def table(self, name: str) -> DataFrame:
        """Return a table of the run's tasks or diagnostics, such as "freezing"."""
        import pandas as pd

        if name not in self.tables:
            there = ", ".join(self.tables) or "none"
            what = f"no table '{one_line(name, 60)}'; there are {there}{did_you_mean(name, self.tables)}"
            raise UserMistake(f"{one_line(self.folder)}: {what}")
        path = self.folder / f"{name}.csv"
        try:
            # "none" and "nan" are text here; only empty cells are missing values
            made = pd.read_csv(path, keep_default_na=False, na_values=[""])
        except (OSError, ValueError) as error:
            raise UserMistake(f"{one_line(path)}: {one_line(error)}; write it anew with `table`") from None
        words = [column for column in made if pd.api.types.is_string_dtype(made[column])]
        made = made.fillna(dict.fromkeys(words, ""))
        return made.assign(**{column: made[column].map(from_cell) for column in words})

    @cached_property
    def leaderboard(self) -> DataFrame:
        """A line for each task, defense, attack, metric and step; the columns are defined in docs/definitions.md."""
        return self.table("leaderboard")

    @cached_property
    def worst_case(self) -> DataFrame:
        """The attack that comes closest to the targets, for each task, defense, metric and step."""
        return self.table("worst_case")

    @cached_property
    def worst_case_by_floor(self) -> DataFrame:
        """The worst case if a released model must keep so much utility, for each of several floors."""
        return self.table("worst_case_by_floor")

    @cached_property
    def curves(self) -> DataFrame:
        """How soon each attack recovers."""
        return self.table("curves")

    @cached_property
    def concepts(self) -> DataFrame:
        """The leaderboard of single concepts."""
        return self.table("concepts")

    def compare(self, defense: str, baseline: str) -> DataFrame:
        """Return a comparison of two defenses: paired differences, intervals, corrected tests. Nothing is written."""
        import pandas as pd

        from harness.analysis import compare

        try:
            lines = compare.compare(self.rows, defense, [baseline], gates=run_folder.gates_of(self.suite, self.folder))
        except ValueError as error:
            raise UserMistake(f"{one_line(self.folder)}: {one_line(error)}") from None
        return pd.DataFrame(lines, columns=list(compare.COLUMNS))

    def images(self, **labels: Any) -> DataFrame:
        """Return the images drawn by models, one per line, with `image` (its number for the prompt) and `path`.

        `labels` are columns of IMAGE_LABELS and their required values: images(defense="none", step=0). The attack "" is
        the released model before any attack. Images that are not on this machine are left out. Raises UserMistake for
        an unknown label, or a value that no row has.
        """
        import pandas as pd

        for name in labels:
            if name not in IMAGE_LABELS:
                what = f"images are not asked for by '{one_line(name, 60)}'{did_you_mean(name, IMAGE_LABELS)}"
                raise UserMistake(f"{what}; use {', '.join(IMAGE_LABELS)}")
        asked = self.rows[self.rows["prompt_index"].notna()]
        for name, value in labels.items():
            if not (asked[name] == value).any():
                known = ", ".join(repr(each) for each in list(asked[name].unique())[:10])
                raise UserMistake(f"images: {name} is nowhere {one_line(repr(value), 60)}; there are {known}")
            asked = asked[asked[name] == value]
        once = asked[[*IMAGE_LABELS, "sample_key"]].drop_duplicates()
        store, found = opening.at(self.folder.parent / "store"), []
        for line in once.itertuples(index=False):
            if not _KEY.fullmatch(line.sample_key):  # it could be a path outside the store
                continue
            kind = store.kind_of(line.sample_key)
            if kind is None:
                continue
            store.require_for_reading(kind, line.sample_key)
            drawn = store.path(kind, line.sample_key) / "images" / step_folder(line.step)
            for path in sorted(drawn.glob(f"{line.prompt_index:03d}_*.png")):
                found.append((*line[:-1], int(path.stem.partition("_")[2]), path))
        return pd.DataFrame(found, columns=[*IMAGE_LABELS, "image", "path"])
