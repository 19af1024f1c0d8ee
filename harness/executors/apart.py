"""A run whose nodes share no folder: each has another one, and the store's objects are all they have in common.

A unit goes to its node with the trial, not as a file. What a node has to say of it comes back with the result: lines
for the user, records of failures, and the ends of their logs. Heartbeats, saved states and whole logs stay there.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.core.files import write_text
from harness.core.identity import Stage
from harness.executors import outcome
from harness.executors.events import Listener
from harness.executors.keeper import Keeper
from harness.executors.walk import Walk
from harness.stages import notices
from harness.stages.execution import failure_path, log_path
from harness.stages.workplace import Workplace

FOLDER = "IMMUNITYBENCH_NODE_FOLDER"
"""Variable of a node, set before its `ray start`: the folder for its cache and its logs, in place of that of --runs."""
MOST_OF_A_LOG = 100_000
"""Bytes of the end of a failed stage's log that are sent."""


def here(workplace: Workplace) -> Workplace:
    """Return the workplace on this node."""
    given = os.environ.get(FOLDER)
    if not given:
        return workplace
    return replace(workplace, store=Path(given, "store"), run_folder=Path(given, workplace.run_folder.name))


def packed(described: list) -> str:
    """Return a unit as a short text: Tune keeps the settings of all trials."""
    return base64.b64encode(zlib.compress(json.dumps(described).encode())).decode("ascii")


def unpacked(text: str) -> list:
    """Return the unit that `packed` was given."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def gathered(workplace: Workplace, stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return, as JSON, what this node has to say of a unit that ended here."""
    folder = workplace.run_folder
    found: dict[str, Any] = {"of": [platform.node(), str(folder)], "notices": notices.take(folder)}
    found["failures"], found["logs"] = {}, {}
    for key, plain in stages.items():
        record = failure_path(folder, plain["kind"], key)
        if record.exists():
            found["failures"][record.name] = record.read_text(encoding="utf-8")
            own = log_path(folder, plain["kind"], key)
            for log in sorted(own.parent.glob(f"{own.stem}*.log")):
                found["logs"][log.name] = _end(log)
    return json.dumps(found)


def _end(log: Path) -> str:
    """Return the end of a log; its first line says what is left out."""
    size = log.stat().st_size
    with open(log, "rb") as file:
        file.seek(max(0, size - MOST_OF_A_LOG))
        text = file.read().decode("utf-8", "replace")
    if size <= MOST_OF_A_LOG:
        return text
    return f"[the first {size - MOST_OF_A_LOG} bytes are in {log} on {platform.node()}]\n{text}"


def received(text: str, run_folder: Path, stages: Mapping[str, Stage], listen: Listener) -> None:
    """Write what a node said of a unit into the folder of the run, and show its lines."""
    said = json.loads(text)
    for message in said["notices"]:
        listen("notice", {"message": message})
    if said["of"] == [platform.node(), str(run_folder)]:
        return  # that node has the folder of the run itself
    records = [failure_path(run_folder, stage.kind, key) for key, stage in stages.items()]
    for record in records:
        if record.name in said["failures"]:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_text(record, said["failures"][record.name])
        else:
            record.unlink(missing_ok=True)
    logs = run_folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name, content in said["logs"].items():
        if Path(name).name == name:
            write_text(logs / name, content)


def do_what_reads_files(walk: Walk, workplace: Workplace, listen: Listener) -> None:
    """Do here the units that read nothing but the user's files, such as folders of images: nodes need not have them."""
    from harness.contracts.stage import to_json

    keeper = Keeper()
    try:
        for index in list(walk.ready):
            unit = {key: walk.plan.stages[key] for key in walk.unit(index).stages}
            if reads_files_alone(unit.values()) and walk.take(index) is not None:
                described = {key: to_json(stage) for key, stage in unit.items()}
                listen("unit_started", {"unit": walk.unit(index).name})
                outcome.of(walk, index, lambda described=described: keeper.do(described, workplace), listen)
    finally:
        keeper.close()


def reads_files_alone(stages: Iterable[Stage]) -> bool:
    """Return whether stages read files of this machine, and neither a model nor another stage."""
    return all(stage.local and not (stage.model or stage.inputs or stage.work) for stage in stages)
