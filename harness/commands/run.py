"""`run`: run the missing stages of a suite, then show its tables."""

from __future__ import annotations

import argparse

from harness.commands import arguments
from harness.core.errors import ExitCode, UserMistake

SUMMARY = "run the missing stages of a suite, then show its leaderboard"
EXECUTORS = ("ray", "serial")
CACHE_MODES = ("always", "never", "only-missing", "only-cached", "stale=redo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_suite(parser)
    arguments.add_store(parser)
    parser.add_argument(
        "--executor", choices=EXECUTORS, default="ray", help="who runs the stages (default: ray)"
    )
    parser.add_argument(
        "--cache", choices=CACHE_MODES, default="only-missing",
        help="only-missing: run what is not committed, and what failed before (default); always: use everything that "
        "is recorded, also failures; never: run everything anew; only-cached: run nothing, show what is committed; "
        "stale=redo: run anew what other code made, and what reads it",
    )  # fmt: skip
    arguments.add_into(parser, "the tables (with --cache only-cached)")
    parser.add_argument("--track", action="store_true", help="write training curves for TensorBoard (extra: tracking)")
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT",
        help="use the Ray cluster with this head (docs/clusters.md) instead of this machine alone"
    )


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.commands.opened import open_suite
    from harness.commands.running import RunOptions, run

    if given.into is not None and given.cache != "only-cached":
        raise UserMistake("--into: requires --cache only-cached; the results of a run go to --runs")
    opened = open_suite(
        given.suite, given.overrides, plugins=given.plugins, runs=given.runs, into=given.into, store=given.store
    )
    options = RunOptions(given.executor, given.cache, given.track, given.ray_address)
    return run(opened, options, arguments.console())
