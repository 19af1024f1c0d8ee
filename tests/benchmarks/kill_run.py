"""Kill a whole run at random moments and compare its tables with those of an undisturbed one.

    python -m tests.benchmarks.kill_run --suite smoke --executor ray --kills 10

The driver and every process that it started get SIGKILL. Each next run goes on from what is committed or was saved by
a stage; the last one is left alone. Prints the moments, what was committed at each, and whether the tables are equal.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def start(suite: str, executor: str, runs: Path) -> subprocess.Popen:
    """Start a run in a session of its own."""
    command = [sys.executable, "-m", "harness", "run", suite, "--executor", executor, "--runs", str(runs)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def kill(process: subprocess.Popen) -> int:
    """Kill the run and all its descendants at once; return how many processes died."""
    victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in victims:
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    return len(victims)


def committed(runs: Path) -> int:
    """Return how many stages the store holds."""
    return len(list(runs.glob("store/*/*/record.json")))


def tables_of(runs: Path) -> dict[str, bytes]:
    """Return the tables of a run by name, without seconds and bytes of memory, which are never the same."""
    return {file.name: _without_measured(file) for file in runs.glob("*/*.csv") if file.name != "adaptation_cost.csv"}


def _without_measured(file: Path) -> bytes:
    """Return a table without the columns that are measured; the file's own bytes if it has none."""
    with open(file, encoding="utf-8", newline="") as opened:
        names, *lines = csv.reader(opened)
    kept = [place for place, name in enumerate(names) if not name.endswith(("_seconds", "_bytes"))]
    if len(kept) == len(names):
        return file.read_bytes()
    return repr([[line[place] for place in kept] for line in (names, *lines)]).encode()


def main() -> int:
    """Command line entry; returns 1 when the rows differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="smoke")
    parser.add_argument("--executor", default="serial", choices=("serial", "ray"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = Path(folder, "undisturbed"), Path(folder, "disturbed")
        begun = time.monotonic()
        assert start(options.suite, options.executor, undisturbed).wait() == 0, "the undisturbed run failed"
        length_s = time.monotonic() - begun
        print(f"undisturbed: {committed(undisturbed)} stages in {length_s:.0f} s")
        for number in range(options.kills):
            process = start(options.suite, options.executor, disturbed)
            known = committed(disturbed)
            while process.poll() is None and committed(disturbed) == known:
                time.sleep(0.02)  # until it is past its start and at work
            moment_s = moments.uniform(0.0, length_s / options.kills)
            try:
                process.wait(timeout=moment_s)
                print(f"kill {number + 1}: the run had ended before {moment_s:.1f} s")
                continue
            except subprocess.TimeoutExpired:
                died = kill(process)
            kept = committed(disturbed)
            print(f"kill {number + 1}: {moment_s:.1f} s into its work, {died} processes, {kept} stages committed")
        code = start(options.suite, options.executor, disturbed).wait()
        tables = [tables_of(folder) for folder in (undisturbed, disturbed)]
        names = tables[0].keys() | tables[1].keys()
        other = sorted(name for name in names if tables[0].get(name) != tables[1].get(name))
        said = f"DIFFER: {', '.join(other)}" if other else f"equal: {', '.join(sorted(tables[0]))}"
        print(f"last run: exit code {code}; {said}")
        return int(code != 0 or bool(other))


if __name__ == "__main__":
    sys.exit(main())
