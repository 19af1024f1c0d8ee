"""`compare`: compare a defense of a run with others."""

from __future__ import annotations

import argparse

from harness.commands import arguments
from harness.core.errors import ExitCode
from harness.core.garbage import collection_paused

SUMMARY = "set a defense of a run beside others: differences, intervals, corrected tests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_run(parser)
    parser.add_argument("--defense", required=True, metavar="LABEL", help="the defense, as the suite labels it")
    parser.add_argument(
        "--baseline", required=True, action="append", metavar="LABEL", dest="baselines",
        help="what it is compared with; may be given several times",
    )  # fmt: skip


@collection_paused()
def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.commands import named
    from harness.results import comparison

    lines = comparison.make(named.run(given.run, given.runs), given.defense, given.baselines)
    comparison.show(lines, arguments.console())
    return ExitCode.DONE
