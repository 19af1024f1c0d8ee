"""What the harness costs beside the stages: units a second, and the share of the workers' time that is idle.

    python -m tests.benchmarks.walk_speed                       # empty stages, and stages of 0.5 s, on 8 workers
    python -m tests.benchmarks.walk_speed --units 400 --workers 4 --seconds 0 1

Stages compute nothing, so 8 workers fit two cores. Each unit is one stage; every second one reads the stage before it.
"bare loop": as many threads take the same stages from a queue, wait as long, and write the same file; no harness.
"walk": the state of a run alone, which hands out units and takes them back. "serial" and "ray": the executors, with
everything that they do for a stage: its record, its commit, its log, its heartbeat. Ray's time begins when half of the
units are done: its start, that of 8 workers and of the processes that they keep, is printed apart.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from harness.core import machine, registry
from harness.core.identity import Input, Stage, key
from harness.executors import ray_tune, serial
from harness.executors.walk import Walk
from harness.model.source import ModelSource
from harness.plan.graph import Plan, Unit
from harness.stages.workplace import Workplace

PLUGIN = str(Path(__file__).parents[1] / "plugins" / "nap.py")


def plan_of(units: int, seconds: float) -> Plan:
    """Return a plan of stages that wait; every second one reads the one before it."""
    kind = registry.get("stage", "nap")
    stages: dict[str, Stage] = {}
    before, made = "", []
    for number in range(units):
        inputs = {"before": Input("nap", before)} if number % 2 else {}
        asked = kind.Parameters(number, seconds)
        stage = Stage("nap", registry.component(kind), asked, inputs, {}, {}, None, "fp32", label=f"nap {number}")
        before, needs = key(stage), ((before,) if number % 2 else ())
        stages[before] = stage
        made.append(Unit(stage.title, (before,), needs))
    return Plan("walk_speed", stages, made)


def bare(plan: Plan, seconds: float, folder: Path, workers: int) -> None:
    """Do the same without the harness."""

    def do(name: str) -> None:
        time.sleep(seconds)
        (folder / name).write_text("", encoding="utf-8")

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(do, plan.stages))


def walk_alone(plan: Plan, workers: int) -> None:
    """Hand out all units to simulated workers that are done at once."""
    walk = Walk(plan, lambda _: False)
    running: list[int] = []
    while not walk.is_finished:
        while len(running) < workers and (index := walk.take()) is not None:
            running.append(index)
        walk.finish(running.pop(0))


@dataclass
class Row:
    """How long it took to do some units."""

    what: str
    workers: int
    units: int
    wall_s: float
    start_s: float = 0.0  # before these units


def rows(units: int, workers: int, seconds: float) -> Iterator[Row]:
    """Do the units in each way; yield a row of it."""
    plan = plan_of(units, seconds)
    done_at: list[float] = []

    def timed(what: str, count: int, do: Callable[[Path], object]) -> Row:
        done_at.clear()
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            do(Path(folder))
            ended = time.perf_counter()
        if what != "ray":
            return Row(what, count, units, ended - started)
        first = len(done_at) // 2
        return Row(what, count, len(done_at) - first - 1, done_at[-1] - done_at[first], done_at[first] - started)

    def listen(event: str, data: Mapping[str, object]) -> None:
        if event == "unit_done":
            done_at.append(time.perf_counter())

    def place(folder: Path) -> Workplace:
        source = ModelSource({"source": "folder", "revision": "none"}, "nowhere")
        return Workplace(folder / "store", folder / "run", source, plugins=(PLUGIN,))

    def ran(executor, folder: Path) -> None:
        summary = executor.run(Walk(plan, lambda _: False), place(folder), listen)
        assert summary.done == units, summary

    yield timed("bare loop", workers, lambda folder: bare(plan, seconds, folder, workers))
    if not seconds:
        yield timed("walk", workers, lambda _: walk_alone(plan, workers))
        yield timed("serial", 1, lambda folder: ran(serial, folder))
    with mock.patch.object(machine, "cores", lambda: workers):
        yield timed("ray", workers, lambda folder: ran(ray_tune, folder))


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.0, 0.5])
    options = parser.parse_args()
    registry.load_plugins([PLUGIN])
    print(f"{options.units} units")
    for seconds in options.seconds:
        for row in rows(options.units, options.workers, seconds):
            ideal_s = row.units * seconds / row.workers
            idle = f", idle {100 * (1 - ideal_s / row.wall_s):.1f} %" if seconds else ""
            start = f", after a start of {row.start_s:.1f} s" if row.start_s else ""
            overhead = 1000 * (row.wall_s - ideal_s) * row.workers / row.units
            print(
                f"  {seconds:g} s a stage, {row.what}, {row.workers} workers: {row.units / row.wall_s:,.1f} units a "
                f"second, {overhead:.2f} ms of a worker's time a unit beside the stage{idle}{start}",
                flush=True,
            )


if __name__ == "__main__":
    main()
