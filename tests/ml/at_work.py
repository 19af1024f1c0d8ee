"""Do single stages in a test: hand-made, committed to a store, without a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.core import registry
from harness.core.identity import Input, Stage, key
from harness.stages.execution import execute
from harness.stages.workplace import Workplace
from harness.store.store import Store


class Desk:
    """A store, and what stages on the tiny model need."""

    def __init__(self, source, folder: Path):
        self.source = source
        self.workplace = Workplace(
            store=folder / "store", run_folder=folder, source=source, checkpoint_interval_s=0.0
        )
        self.store = Store(folder / "store")

    def stage(self, kind: str, parameters: Any, *, component: str | None = None, **given: Any) -> tuple[str, Stage]:
        """Return (key, stage)."""
        cls = registry.get("stage", kind)
        made = {"inputs": {}, "data": {}, "seed": 1, "local": {}, **given}
        stage = Stage(
            kind=kind, component=component or registry.component(cls), parameters=parameters,
            model=self.source.identity, precision="fp32", label=kind, **made,
        )  # fmt: skip
        return key(stage), stage

    def do(self, kind: str, parameters: Any, **given: Any) -> tuple[Input, Path]:
        """Do a stage; return what others read, and its folder."""
        known, stage = self.stage(kind, parameters, **given)
        execute(known, stage, self.workplace)
        return Input(kind, known), self.store.path(kind, known)
