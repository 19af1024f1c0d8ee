"""`fetch`: bring everything that a suite needs from elsewhere, so that `run` needs no network."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands import arguments
from harness.core import disk
from harness.core.counted import counted
from harness.core.errors import ExitCode, UserMistake, one_line

if TYPE_CHECKING:
    from harness.core.fetched import Fetched, Progress
    from harness.suite.loaded import LoadedSuite
    from harness.suite.locked import Lock

SUMMARY = "fetch what a suite needs from elsewhere: models, encoders, images; then run needs no network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_suite(parser)
    parser.add_argument(
        "--lock", metavar="FILE",
        help="where revisions and digests are recorded, and compared if the file exists (default: suite.lock.json in "
        "the folder of the run)",
    )  # fmt: skip


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.commands import fetch_progress, named
    from harness.core import registry
    from harness.suite import fetching, loading, locked

    found = named.suite(given.suite, given.runs)
    registry.load_plugins(given.plugins)
    loaded = loading.load_without_images(found.suite, given.overrides)
    lock = locked.Lock.read(Path(given.lock) if given.lock else found.runs / loaded.suite.name / locked.NAME)
    asked = fetching.of_suite(loaded)
    _show(asked)
    fetching.require_offline(loaded)
    mistakes = _fetch_all(asked, lock, fetch_progress.progress())
    lock.write()
    if mistakes:
        raise UserMistake(mistakes)
    arguments.note(loading.load(found.suite, given.overrides).notices)  # images are checked now that they are here
    _end(asked, lock, loaded)
    return ExitCode.DONE


def _show(asked: Mapping[Fetched, Sequence[tuple]]) -> None:
    """Print what is here and what comes."""
    from harness.core.fetched import format_size

    if not asked:
        print("nothing is fetched: all that this suite needs ships with it or is on this machine")
    come = []
    for one in asked:
        cached = one.is_cached()
        if cached is False:
            come.append(one)
        state = {True: "here", False: "to fetch", None: "unknown"}[cached]
        print(f"{state}: {one}" + (f" from {one.origin}" if one.origin and cached is False else ""))
    known = sum(one.size or 0 for one in come)
    if come:
        unknown = sum(one.size is None for one in come)
        more = f", and {counted(unknown, 'item')} of unknown size" if unknown else ""
        sizes = f": about {format_size(known)}{more}" if known else ""
        print(f"{counted(len(come), 'item')} to fetch{sizes}", flush=True)


def _fetch_all(asked: Mapping[Fetched, Sequence[tuple]], lock: Lock, progress: Progress) -> list[str]:
    """Fetch everything, compare it with the lock file, and record it; return what went wrong.

    One item that cannot be had does not keep the others from being fetched.
    """
    from harness.core.transfer_words import Unreachable

    mistakes: list[str] = []
    silent: set[str | None] = set()  # hosts without a connection
    for one in asked:
        if one.origin in silent and not one.is_cached():
            mistakes.append(f"{one.id}: not tried: no connection to {one.origin}")
            continue
        try:
            held = one.fetch(progress, lock.of(one))
        except UserMistake as mistake:
            mistakes += mistake.messages
            if isinstance(mistake, Unreachable):
                silent.add(one.origin)
            continue
        except OSError as error:  # a cache of another user
            if disk.is_full(error):
                raise
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            mistakes.append(f"{one.id}: cannot be kept: {one_line(what, 300)}; set HF_HOME or XDG_CACHE_HOME")
            continue
        differences = lock.compare(one, held)
        mistakes += differences
        if not differences and held.files:
            lock.add(one, held)
            lock.write()  # what is here is recorded, whatever comes next
    return mistakes


def _end(asked: Mapping[Fetched, Sequence[tuple]], lock: Lock, loaded: LoadedSuite) -> None:
    """Print what is here now."""
    from harness.suite import image_sources

    files = [file for one in asked if (held := lock.of(one)) is not None for file in held.files]
    if not files:
        return
    print(f"{counted(len(files), 'file')} checked; recorded in {lock.path}")
    if all(one.is_cached() for one in asked):
        print(f"all is here: `{image_sources.command(loaded, 'run')}` needs no network")
