"""Command-line arguments of several verbs, and parsers for numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from harness.core.errors import one_line


def add_suite(parser: argparse.ArgumentParser) -> None:
    """Add the suite and its options."""
    parser.add_argument(
        "suite", help="a suite file, the name of a bundled one (see: list), the folder of a run, or a run's name"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a value of the suite, such as seeds=3 or attacks.0.steps=[10,20]; tasks.NAME=null leaves a "
        "task out",
    )  # fmt: skip
    add_plugins(parser)
    add_runs(parser)


def add_plugins(parser: argparse.ArgumentParser, what: str = "defenses, attacks, metrics, tasks, ...") -> None:
    """Add the option for plug-ins."""
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE", dest="plugins",
        help=f"a Python file that registers {what}",
    )  # fmt: skip


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the run whose results are read."""
    parser.add_argument("run", help="the folder of a run, such as runs/quickstart, a run's name, or its suite")
    add_runs(parser, "where a run is looked for by its name")


def add_runs(parser: argparse.ArgumentParser, what: str = "where results go") -> None:
    """Add the option for the results folder."""
    parser.add_argument(
        "--runs", metavar="FOLDER", help=f"{what} (default: that of the run, if one is named; else runs)"
    )


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add the option for objects that machines share behind the results folder."""
    parser.add_argument(
        "--store", metavar="URL",
        help="where machines share their stages: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER "
        "(docs/clusters.md); the results folder is its cache, and remembers it; none: the results folder alone",
    )  # fmt: skip


def add_into(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option for a folder in place of the run's, whose disk may be full or read-only."""
    parser.add_argument("--into", metavar="FOLDER", help=f"write {what} into this folder instead of the run's")


def count(text: str) -> int:
    """Return an integer of at least 1; otherwise raise argparse's error."""
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0 and len(text) < 9):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1 (got '{one_line(text, 60)}')")
    return int(text)


def throughput(text: str) -> float:
    """Return a number greater than 0; otherwise raise argparse's error."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number greater than 0 (got '{one_line(text, 60)}')")
    return value


def gigabytes(text: str) -> float:
    """Return a size such as 24GB in GB (10^9 bytes); otherwise raise argparse's error."""
    plain = text.strip().upper().removesuffix("GB").strip()
    try:
        value = float(plain)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"must be the size of a card, such as 24GB (got '{one_line(text, 60)}')")
    return value


def difference(text: str) -> tuple[float, bool]:
    """Return (number greater than 0, whether it is a share) of a text such as 0.05 or 10%, for argparse."""
    is_share = text.rstrip().endswith("%")
    try:
        value = float(text.rstrip().removesuffix("%")) / (100 if is_share else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        what = "a number greater than 0 in the metric's unit, or a share such as 10%"
        raise argparse.ArgumentTypeError(f"must be {what} (got '{one_line(text, 60)}')")
    return value, is_share


def console(width_when_piped: int = 160):
    """Return the rich console that results are printed to."""
    from rich.console import Console

    class Ours(Console):
        """A console that leaves a reader that has ended, as `head` does, to the caller: rich would exit at once."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # labels such as object:pizza must not be read as markup or emoji codes
    return Ours(file=sys.stdout, width=None if sys.stdout.isatty() else width_when_piped, markup=False, emoji=False)


def note(lines: Iterable[str]) -> None:
    """Print what was ignored, changed, cut or assumed of the user's input."""
    for line in lines:
        print(f"note: {one_line(line, 1000)}", file=sys.stderr)


def warn(line: str) -> None:
    """Print a problem that did not prevent the results."""
    print(f"warning: {one_line(line, 1000)}", file=sys.stderr)
