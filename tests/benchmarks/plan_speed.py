"""How long it takes to plan a suite, in a fresh process and with all imports, and its peak memory.

    python -m tests.benchmarks.plan_speed                     # about 5,000 trials
    python -m tests.benchmarks.plan_speed --trials 100000
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFENSES, ATTACKS, TARGETS, INNOCENTS = 10, 10, 11, 1


def write_suite(folder: Path, trials: int) -> Path:
    """Write a suite of 10 defenses, 10 attacks, 11 targets and an innocent, of `trials` or more; return its path."""
    from tests.conftest import write_model

    seeds = math.ceil(trials / (DEFENSES * TARGETS * (ATTACKS + 1) * 2))  # of each target with the innocent

    write_model(folder / "model")
    names = [f"target{i}" for i in range(TARGETS)] + [f"innocent{i}" for i in range(INNOCENTS)]
    lines = ["name: large", "model: model", f"seeds: {seeds}", "concepts:"]
    lines += [f"  {name}: {{kind: object, label: {name}, generate: {{}}}}" for name in names]
    lines.append("  sky: {kind: object, label: sky, generate: {}}")
    lines += [
        "tasks:",
        f"  relearning: {{erase: uce, targets: [{', '.join(names[:TARGETS])}], innocents: [{names[-1]}]}}",
        "defenses:",
        "  - none",
        *(f"  - {{method: imma, name: imma{i}, rounds: {i + 1}}}" for i in range(DEFENSES - 1)),
        "attacks:",
        *(f"  - {{method: lora, name: lora{i}, steps: [10, 40, 120], rank: {i + 1}}}" for i in range(ATTACKS)),
        "metrics: [clip_image, clip_text]",
        "utility: [sky]",
    ]
    path = folder / "suite.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Print seconds and peak memory of the whole process of `validate` and `plan`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        suite = write_suite(Path(folder), options.trials)
        for verb in ("validate", "plan"):
            command = [sys.executable, "-m", "harness", verb, str(suite), "--runs", f"{folder}/runs"]
            started = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            said = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
            assert status == 0, said
            print(
                f"{verb}: {wall:.2f} s wall, {used.ru_utime:.2f} s user, {used.ru_stime:.2f} s system, peak "
                f"{used.ru_maxrss / 1024:.0f} MB"
            )
            print("  " + said.splitlines()[0].replace(folder, ""))


if __name__ == "__main__":
    main()
