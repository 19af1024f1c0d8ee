"""`table`: write and show the tables of the committed stages."""

from __future__ import annotations

import argparse

from harness.commands import arguments
from harness.core.counted import counted
from harness.core.errors import ExitCode
from harness.core.garbage import collection_paused

SUMMARY = "write and show the tables from what is committed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_suite(parser)
    arguments.add_store(parser)
    arguments.add_into(parser, "the tables")
    parser.add_argument(
        "--with-paper", action="store_true",
        help="also write papers' printed numbers of the same tasks and defenses, in a separate table",
    )  # fmt: skip


@collection_paused()
def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.commands.opened import open_suite
    from harness.commands.running import show_other_code
    from harness.commands.written import show, write_resolved, write_tables
    from harness.results import papers

    opened = open_suite(
        given.suite, given.overrides, plugins=given.plugins, runs=given.runs, into=given.into, store=given.store
    )
    opened.make_folder(for_tables=True)
    beside = papers.beside(opened.loaded.suite, arguments.warn) if given.with_paper else []
    written = write_tables(opened, beside)
    write_resolved(opened)
    console = arguments.console()
    show(opened, written, console)
    show_other_code(opened, opened.made_by_other_code(opened.committed()), console)
    if given.with_paper:
        papers.write(beside, opened.folder)
        print(f"papers' numbers: {counted(len(beside), 'row')} in {opened.folder}/{papers.FILE}.md and .csv")
    return ExitCode.DONE
