"""`merge`: merge the stages of several results folders into one."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import arguments
from harness.core import disk
from harness.core.counted import counted
from harness.core.errors import ExitCode, UserMistake, one_line

SUMMARY = "copy the stages of several results folders into one; a stage with two results is refused"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "sources", nargs="+", metavar="FOLDER",
        help="a results folder (runs), a store, or the folder of a run, for all stages of its results folder",
    )  # fmt: skip
    parser.add_argument("--into", default="runs", metavar="FOLDER", help="the results folder to fill (default: runs)")


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.commands import named
    from harness.store import merging, opening

    try:
        sources = [named.results_of(source) for source in given.sources]
        for source in sources:
            if url := opening.remembered(Path(source, "store")) or opening.remembered(Path(source)):
                arguments.note([f"{source} is the cache of {url}: what is in the folder is merged, and nothing else"])
        merged = merging.merge(sources, given.into)
    except OSError as error:
        if disk.is_full(error):
            raise
        raise UserMistake(f"--into {one_line(given.into)}: {one_line(error.strerror or error)}") from None
    print(f"{counted(merged.copied, 'stage')} copied into {one_line(given.into)}, {merged.known} were there already")
    return ExitCode.DONE
