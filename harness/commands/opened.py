"""A suite that was read and planned, with the folders of its run; the start of most verbs."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core import registry
from harness.core.errors import UserMistake, one_line
from harness.plan import Plan, make
from harness.store.store import Store
from harness.suite.loaded import LoadedSuite
from harness.suite.loading import find, load

if TYPE_CHECKING:
    from harness.analysis.leaderboard import Gates
    from harness.model.source import ModelSource


@dataclass(frozen=True)
class Opened:
    """A checked suite with its plan, its store and the folder of its results."""

    loaded: LoadedSuite
    plan: Plan
    store: Store
    folder: Path
    plugins: tuple[str, ...]

    @property
    def source(self) -> ModelSource:
        """The base model."""
        return self.loaded.model

    @property
    def gates(self) -> Gates:
        """The conditions for a valid cell of the leaderboard."""
        from harness.analysis.leaderboard import Gates

        return Gates(**self.loaded.suite.gates.model_dump())

    def make_folder(self) -> None:
        """Create the run's folder. Raises UserMistake if it is not writable."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.store.root.mkdir(exist_ok=True)
            for folder in (self.folder, self.store.root):
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
                    pass
        except OSError as error:
            raise UserMistake(f"--runs {self.folder.parent}: cannot be written: {one_line(error.strerror)}") from None

    def made_by_other_code(self, committed: Collection[str]) -> list[str]:
        """Return the keys of the committed stages that other code made than the code that is here."""
        from harness.stages import code

        return code.made_by_other(self.plan.stages, committed, self.store)

    def committed(self) -> set[str]:
        """Return the keys of the plan's stages that are in the store."""
        by_kind = {kind: self.store.committed(kind) for kind in {stage.kind for stage in self.plan.stages.values()}}
        return {key for key, stage in self.plan.stages.items() if key in by_kind[stage.kind]}


def open_suite(
    suite: str, overrides: Sequence[str] = (), *, plugins: Sequence[str] = (), runs: str = "runs"
) -> Opened:
    """Read, check and plan a suite: a file, or the name of a bundled one.

    `overrides` are key=value, as for --set. Raises UserMistake with all mistakes.
    """
    folder = _runs_folder(runs)
    registry.load_plugins(plugins)
    loaded = load(find(suite), overrides)
    return Opened(
        loaded=loaded,
        plan=make(loaded),
        store=Store(folder / "store"),
        folder=folder / loaded.suite.name,
        plugins=tuple(str(Path(path).resolve()) for path in plugins),
    )


def _runs_folder(given: str) -> Path:
    """Return the results folder. Raises UserMistake if it cannot exist."""
    try:
        path = Path(given)
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    except (OSError, ValueError) as error:
        raise UserMistake(f"--runs {one_line(given)}: {one_line(getattr(error, 'strerror', None) or error)}") from None
    if not nearest.is_dir():
        what = "is a file" if nearest == path else f"'{one_line(nearest)}' is a file"
        raise UserMistake(f"--runs {one_line(given)}: {what}; name a folder")
    return path
