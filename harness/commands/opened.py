"""A suite that was read and planned, with the folders of its run; the start of most verbs."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands import arguments, named
from harness.core import disk, registry
from harness.core.errors import UserMistake, one_line
from harness.plan import Plan, make
from harness.store import opening
from harness.store.store import Store
from harness.suite import resolved
from harness.suite.loaded import LoadedSuite
from harness.suite.loading import load

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

    def make_folder(self, *, for_tables: bool = False) -> None:
        """Create the run's folder. Raises UserMistake if it is not writable.

        `for_tables`: nothing else is written, so the store may be on a disk that is read alone.
        """
        try:
            for folder in (self.folder,) if for_tables else (self.folder, self.store.root):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
                    pass
            if self.store.url is not None:
                opening.remember(self.store)
        except OSError as error:
            if disk.is_full(error):
                raise
            is_elsewhere = self.folder.parent != self.store.root.parent
            where = f"--into {self.folder}" if is_elsewhere else f"--runs {self.folder.parent}"
            hint = "; write the tables to another folder with --into" if for_tables and not is_elsewhere else ""
            raise UserMistake(f"{where}: cannot be written: {one_line(error.strerror)}{hint}") from None

    def made_by_other_code(self, committed: Collection[str]) -> list[str]:
        """Return the keys of the committed stages that other code made than the code that is here."""
        from harness.stages import code

        return code.made_by_other(self.plan.stages, committed, self.store)

    def committed(self) -> set[str]:
        """Return the keys of the plan's stages that are in the store, as it is now; their records can be read then."""
        by_kind = {kind: self.store.committed(kind) for kind in {stage.kind for stage in self.plan.stages.values()}}
        found = {key for key, stage in self.plan.stages.items() if key in by_kind[stage.kind]}
        self.store.know((self.plan.stages[key].kind, key) for key in found)
        return found


def open_suite(
    suite: str,
    overrides: Sequence[str] = (),
    *,
    plugins: Sequence[str] = (),
    runs: str | None = None,
    into: str | None = None,
    store: str | None = None,
) -> Opened:
    """Read, check and plan a suite: a file, the name of a bundled one, the folder of a run, or a run's name.

    `overrides` are key=value, as for --set. `runs`: the results folder; None: that of the run that is named, else
    "runs". `into`: a folder for the tables, in place of the run's. `store`: the URL of the objects behind the results
    folder; None: that which the folder remembers, said in one line; "none": no objects. Raises UserMistake with all
    mistakes.
    """
    found = named.suite(suite, runs)
    registry.load_plugins(plugins)
    try:
        loaded = load(found.suite, overrides)
    except UserMistake as mistake:
        missing = resolved.plugins(found.suite) if found.is_run and not plugins else []
        if not missing:
            raise
        again = " ".join(f"--plugin {one_line(file, 300)}" for file in missing)
        raise UserMistake([*mistake.messages, f"{one_line(found.suite)}: this run was made with {again}"]) from None
    return Opened(
        loaded=loaded,
        plan=make(loaded),
        store=_store(found.runs / "store", store),
        folder=Path(into) if into is not None else found.runs / loaded.suite.name,
        plugins=tuple(str(Path(path).resolve()) for path in plugins),
    )


def _store(root: Path, url: str | None) -> Store:
    """Return the store in a folder. Raises UserMistake if its objects cannot be listed."""
    if url is None and (known := opening.remembered(root)):
        arguments.note([f"store: {known}, as {root} remembers; --store none uses what is in that folder alone"])
    found = opening.at(root, url)
    if found.url is not None:
        opening.require_own(root, found.url)
        found.objects.require_readable()
    return found
