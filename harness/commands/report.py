"""`report`: make the report page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import arguments
from harness.core import registry
from harness.core.counted import counted
from harness.core.errors import ExitCode, one_line

SUMMARY = "make the page of a run: leaderboard, curves, images, provenance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_run(parser)
    arguments.add_into(parser, "the page (in a folder `report`)")
    parser.add_argument(
        "--prompts", type=arguments.count, default=3, metavar="N",
        help="prompts that an image sheet shows (default: 3)",
    )  # fmt: skip
    arguments.add_plugins(parser, "diagnostics with a section of the report")


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.commands import named
    from harness.report import page
    from harness.store import opening

    registry.load_plugins(given.plugins)
    into = Path(given.into) if given.into is not None else None
    folder = named.run(given.run, given.runs)
    if url := opening.remembered(folder.parent / "store"):
        arguments.note([f"store: {url}; images that the page shows and that are not here are fetched from there"])
    made = page.make(folder, given.prompts, into)
    print(
        f"written: {one_line(made.page, 1000)} ({counted(made.sheets, 'image sheet')}, {counted(made.images, 'image')})"
    )
    return ExitCode.DONE
