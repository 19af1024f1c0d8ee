"""Stages to which things happen: `python -m tests.ml.misfortunes FOLDER GPUS WORKERS WHAT...` does some under Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from harness.core import registry
from harness.core.errors import UserMistake
from harness.core.identity import Input, Stage, key
from harness.core.sharding import Sharding
from harness.executors import ray_tune
from harness.executors.walk import Walk
from harness.model.source import ModelSource
from harness.plan.graph import Plan, Unit
from harness.stages.workplace import Workplace

PLUGIN = str(Path(__file__).parents[1] / "plugins" / "misfortunes.py")


def workplace(folder: Path, **changes) -> Workplace:
    """Load the plug-in; return where its stages are done."""
    registry.load_plugins([PLUGIN])
    source = ModelSource({"source": "folder", "revision": "none"}, "nowhere")
    return Workplace(folder / "store", folder / "run", source, plugins=(PLUGIN,), **changes)


def misfortune(what: str = "", label: str = "", after: str = "", **parameters) -> Stage:
    """Return a stage to which something happens; `after`: the key of a stage that it reads."""
    kind = registry.get("stage", "misfortune")
    asked, label = kind.Parameters(what, **parameters), label or what or "good"
    inputs = {"before": Input("misfortune", after)} if after else {}
    return Stage("misfortune", registry.component(kind), asked, inputs, {}, {}, None, "fp32", label=label)


def plan_of(stages: Iterable[Stage]) -> Plan:
    """Return a plan of one stage a unit."""
    by_key = {key(stage): stage for stage in stages}
    return Plan("suite", by_key, [Unit(stage.title, (k,), ()) for k, stage in by_key.items()])


def main(folder: str, gpus: str, workers: str, *whats: str) -> None:
    """Print the summary as JSON, or what the user did wrong."""
    place = workplace(Path(folder), gpus=float(gpus), sharding=Sharding(int(workers), 2 if int(workers) > 1 else 0))
    stages = [replace(misfortune(what), workers=int(workers)) for what in whats]
    try:
        summary = ray_tune.run(Walk(plan_of(stages), lambda _: False), place, lambda event, data: None)
    except UserMistake as mistake:
        print(json.dumps({"mistake": str(mistake)}))
    else:
        print(json.dumps(asdict(summary)))


if __name__ == "__main__":
    main(*sys.argv[1:])
