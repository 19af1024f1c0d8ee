"""`list`: show registered methods and the bundled suites."""

from __future__ import annotations

import argparse

from harness.commands import arguments
from harness.core.errors import ExitCode

KINDS = ("task", "defense", "attack", "metric", "detector", "diagnostic", "stage")
"""The displayed kinds, in this order."""

SUMMARY = "show what is registered, and the bundled suites"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_plugins(parser)


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    from harness.core import registry
    from harness.suite.loading import bundled_suites

    registry.load_plugins(given.plugins)
    for kind in KINDS:
        print(f"{kind}s:")
        for name in registry.names(kind):
            about = registry.describe(registry.get(kind, name))
            print(f"  {name:<24} v{about['version']}  {about['summary']}")
    print("suites:")
    for path in bundled_suites():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"  {path.stem:<24} {first}")
    return ExitCode.DONE
