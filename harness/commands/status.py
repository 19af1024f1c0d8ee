"""`status`: show the progress of a suite, and its failures."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING

from harness.commands import arguments
from harness.core.errors import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from harness.commands.opened import Opened

SUMMARY = "show how far a suite is and what failed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_suite(parser)


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.commands.opened import open_suite

    opened = open_suite(given.suite, given.overrides, plugins=given.plugins, runs=given.runs)
    return show(opened, arguments.console())


def show(opened: Opened, console: Console) -> ExitCode:
    """Print how many stages are committed, and the failures; return the exit code that a run would return."""
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
        console.print(f"failed: {failure['label']}: {failure['error']}", style="red", highlight=False, markup=False)
    if failures:
        return ExitCode.TRIALS_FAILED
    console.print("finished" if len(committed) == len(plan.stages) else "not finished; `run` goes on", highlight=False)
    return ExitCode.DONE
