"""The command line. Imports nothing heavy until a verb needs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from harness.core import disk, machine, streams, termination
from harness.core.errors import ExitCode, UserMistake, one_line
from harness.core.version import __version__

EPILOG = """\
examples:
  python -m harness run quickstart
  python -m harness plan quickstart
  python -m harness run my_suite.yaml --plugin my_defense.py --set seeds=3
exit codes: 0 all done, 1 some trials failed, 2 mistake in the input, 5 a disk is full,
130 interrupted (Ctrl-C, SIGTERM); of `status` also 3 a run is in progress, 4 not finished and nothing runs
"""
VERBS = (
    "run", "plan", "validate", "fetch", "check", "status", "table", "compare", "report", "merge", "verify", "list",
    "doctor",
)  # fmt: skip
"""Modules of `harness.commands`, in the order of the help."""
WORKING = ("run", "fetch", "check", "merge", "report")
"""Verbs that may have left work undone when they end with the reader of their output; the others only show."""


class _Parser(argparse.ArgumentParser):
    """A parser that reports mistakes in one line, as we do, in place of the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {one_line(message, 300)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(int(ExitCode.USER_MISTAKE))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m harness",
        description="ImmunityBench: measure how well a released text-to-image model resists malicious adaptation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"immunitybench {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for name in VERBS:
        verb = importlib.import_module(f"harness.commands.{name}")
        verb.add_arguments(verbs.add_parser(name, help=verb.SUMMARY, description=verb.SUMMARY))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code. Mistakes of the user go to stderr, one line each.

    Raises SystemExit for --help and for arguments that cannot be read, as argparse does.
    """
    streams.prepare()
    machine.replace_missing_home()
    try:
        with termination.as_interrupt():
            given = _parser().parse_args(arguments)
            code = int(importlib.import_module(f"harness.commands.{given.verb}").main(given))
            sys.stdout.flush()  # here, where a reader that has ended is no error
            return code
    except UserMistake as mistake:
        for message in mistake.messages:
            print(f"error: {one_line(message, 1000)}", file=sys.stderr)
        return int(ExitCode.USER_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        streams.silence()  # the reader of our output has ended, as `head` does
        return int(ExitCode.INTERRUPTED if given.verb in WORKING else ExitCode.DONE)
    except OSError as error:
        if not disk.is_full(error):
            raise
        print(f"error: {one_line(error, 300)}; free some space, then give the same command", file=sys.stderr)
        return int(ExitCode.DISK_FULL)
