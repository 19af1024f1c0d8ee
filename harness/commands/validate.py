"""`validate`: report all mistakes in a suite, before any compute."""

from __future__ import annotations

import argparse

from harness.commands import arguments
from harness.core.counted import counted
from harness.core.errors import ExitCode, one_line
from harness.core.garbage import collection_paused

SUMMARY = "check a suite and report all mistakes in it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_suite(parser)


@collection_paused()
def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.commands.opened import open_suite
    from harness.store import opening
    from harness.suite import fetching

    opened = open_suite(given.suite, given.overrides, plugins=given.plugins, runs=given.runs, store=opening.NONE)
    arguments.note(opened.loaded.notices)
    plan = opened.plan
    print(
        f"{one_line(given.suite)}: valid; {counted(len(plan.measurements), 'trial')}, "
        f"{counted(len(plan.stages), 'stage')} in {counted(len(plan.units), 'unit')}"
    )
    for line in (*fetching.missing(opened.loaded), *fetching.not_installed(opened.loaded)):
        print(line)
    return ExitCode.DONE
