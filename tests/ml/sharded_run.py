"""Do a suite serially with state saved after every step: `python -m tests.ml.sharded_run SUITE FOLDER [SETTING...]`.

A setting "kind=NAME" does only the stages of a kind, and what they read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness import plan, suite
from harness.core import registry
from harness.stages.execution import execute_unit
from harness.stages.workplace import Workplace


def main(path: str, folder: Path, settings: list[str]) -> None:
    """Do every unit; results are in FOLDER/store."""
    registry.load()
    kinds = {setting.removeprefix("kind=") for setting in settings if setting.startswith("kind=")}
    loaded = suite.load(Path(path), [setting for setting in settings if not setting.startswith("kind=")])
    planned = plan.make(loaded)
    workplace = Workplace(
        store=folder / "store",
        run_folder=folder,
        source=loaded.model,
        sharding=loaded.suite.resources.sharding(),
        checkpoint_interval_s=0.0,
    )
    wanted = {key for key, stage in planned.stages.items() if not kinds or stage.kind in kinds}
    reading = list(wanted)
    while reading:
        new = {read.key for read in planned.stages[reading.pop()].inputs.values()} - wanted
        wanted |= new
        reading += new
    for unit in planned.units:
        stages = {key: planned.stages[key] for key in unit.stages if key in wanted}
        if stages:
            execute_unit(stages, workplace)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
