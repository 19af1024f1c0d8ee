"""`status`: show the progress of a suite, what runs now, and its failures."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from typing import TYPE_CHECKING

from harness.commands import arguments
from harness.core.errors import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from harness.commands.opened import Opened
    from harness.stages.heartbeat import Beat

SUMMARY = "show how far a suite is, what runs now and what failed"
EPILOG = """\
exit codes, the first that is true: 3 a run is in progress, 1 some stages failed, 0 finished, 4 not finished and nothing
runs; 2 mistake in the input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_suite(parser)
    arguments.add_store(parser)
    parser.epilog = EPILOG


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.commands.opened import open_suite

    opened = open_suite(given.suite, given.overrides, plugins=given.plugins, runs=given.runs, store=given.store)
    return show(opened, arguments.console())


def show(opened: Opened, console: Console) -> ExitCode:
    """Print how many stages are committed, what runs, and the failures; return the exit code that EPILOG explains."""
    from harness.commands.running import show_other_code
    from harness.contracts.stage import kinds_in_order
    from harness.stages.execution import failure_path

    committed = opened.committed()
    plan = opened.plan
    kinds = Counter(s.kind for s in plan.stages.values())
    done = Counter(plan.stages[k].kind for k in committed)
    width = max(map(len, kinds), default=0)
    for kind in kinds_in_order():
        if kinds[kind]:
            console.print(f"{kind:<{width}} {done[kind]:>6} of {kinds[kind]}", highlight=False)
    show_other_code(opened, opened.made_by_other_code(committed), console)
    failures = [
        json.loads(path.read_text("utf-8"))
        for key, stage in plan.stages.items()
        if (path := failure_path(opened.folder, stage.kind, key)).exists() and key not in committed
    ]
    for failure in failures:
        _print(console, f"failed: {failure['label']}: {failure['error']}", style="red")
    is_running = _show_running(opened, committed, console)
    if opened.store.url is not None:
        _print(
            console,
            f"store: {opened.store.url}; what other machines and other nodes do now is not seen here: their heartbeats "
            "stay there",
        )
    if is_running:
        return ExitCode.RUNNING
    if failures:
        return ExitCode.TRIALS_FAILED
    if len(committed) == len(plan.stages):
        console.print("finished", highlight=False)
        return ExitCode.DONE
    console.print("not finished, and nothing runs; `run` goes on", highlight=False)
    return ExitCode.UNFINISHED


def _show_running(opened: Opened, committed: set[str], console: Console) -> bool:
    """Print each stage in progress and where dead processes ended; return whether a run or a stage is in progress."""
    from harness.stages import heartbeat

    is_running = False
    for beat in heartbeat.read(opened.folder):
        where = f"on {beat.host}, process {beat.pid}"
        if beat.is_alive:
            is_running = True
            silent = f"; SILENT for {_ago(beat.beat)}, perhaps stopped" if beat.is_silent else ""
            what = _progress(beat) if beat.what == "stage" else f"the run, for {_ago(beat.started)}"
            _print(console, f"running: {what}, {where}{silent}")
        elif beat.what == "stage" and beat.key not in committed:
            _print(console, f"ended without a word: {_progress(beat)}, {where}, which is gone")
    return is_running


def _progress(beat: Beat) -> str:
    at = f"step {beat.done} of {beat.total} {_ago(beat.progressed)} ago" if beat.progressed else "no step yet"
    return f"{beat.label}: {at}, for {_ago(beat.started)}"


def _ago(then: float) -> str:
    from harness.executors.progress import format_seconds

    return format_seconds(max(0.0, time.time() - then))


def _print(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
