"""`verify`: read every committed stage, and name those that are not what was committed."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import arguments
from harness.core.counted import counted
from harness.core.errors import ExitCode, UserMistake, one_line

SUMMARY = "read all committed stages and name those that are damaged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_runs(parser)
    parser.add_argument(
        "--set-aside", action="store_true", help="move damaged stages out of the store, so that `run` makes them anew"
    )


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb; exit code 1 if a stage is damaged."""
    from harness.store import opening
    from harness.store.store import DAMAGED, Store

    root = Path(given.runs) / "store"
    if not root.is_dir():
        raise UserMistake(f"--runs {one_line(given.runs)}: holds no store; name a folder of results, such as runs")
    store = Store(root)
    if url := opening.remembered(root):
        arguments.note([f"{root} is the cache of {url}: what is in the folder is read, and nothing else"])
    total = sum(len(store.committed(kind)) for kind in store.kinds())
    found = []
    for damaged in store.damages():
        print(one_line(damaged, 1000), flush=True)
        found.append(damaged)
    if not found:
        print(f"{counted(total, 'stage')} read, none damaged")
        return ExitCode.DONE
    if given.set_aside:
        for damaged in found:
            store.set_aside(damaged.kind, damaged.key)
        print(f"{len(found)} of {counted(total, 'stage')} damaged; moved to {root / DAMAGED}; `run` makes them anew")
    else:
        print(f"{len(found)} of {counted(total, 'stage')} damaged; with --set-aside, `run` makes them anew")
    return ExitCode.TRIALS_FAILED
