"""Do a suite serially with state kept after every step: `python -m tests.ml.sharded_run SUITE FOLDER [SETTING...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from harness import plan, suite
from harness.core import registry
from harness.stages.execution import execute_unit
from harness.stages.workplace import Workplace


def main(path: str, folder: Path, settings: list[str]) -> None:
    """Do every unit; results lie in FOLDER/store."""
    registry.load()
    loaded = suite.load(Path(path), settings)
    planned = plan.make(loaded)
    workplace = Workplace(
        store=folder / "store",
        run_folder=folder,
        source=loaded.model,
        sharding=loaded.suite.resources.sharding(),
        checkpoint_interval_s=0.0,
    )
    for unit in planned.units:
        execute_unit({key: planned.stages[key] for key in unit.stages}, workplace)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
