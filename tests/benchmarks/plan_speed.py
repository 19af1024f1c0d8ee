"""How long it takes to plan a suite of 10,000 trials, in a fresh process and with all imports.

python tests/benchmarks/plan_speed.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFENSES, ATTACKS, SEEDS, TARGETS, INNOCENTS = 10, 10, 4, 11, 1


def write_suite(folder: Path) -> Path:
    """Write a suite of 10 defenses, 10 attacks, 4 seeds, 11 targets and an innocent; return its path."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import write_model

    write_model(folder / "model")
    names = [f"target{i}" for i in range(TARGETS)] + [f"innocent{i}" for i in range(INNOCENTS)]
    lines = ["name: large", "model: model", f"seeds: {SEEDS}", "concepts:"]
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
    """Print seconds of the whole process of `validate` and `plan`."""
    with tempfile.TemporaryDirectory() as folder:
        suite = write_suite(Path(folder))
        for verb in ("validate", "plan"):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            finished = subprocess.run(
                [sys.executable, "-m", "harness", verb, str(suite), "--runs", f"{folder}/runs"],
                cwd=ROOT, capture_output=True, text=True, check=True,
            )  # fmt: skip
            wall = time.perf_counter() - started
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
            print(f"{verb}: {wall:.2f} s wall, {user:.2f} s user, {system:.2f} s system")
            print("  " + finished.stdout.splitlines()[0].replace(folder, ""))


if __name__ == "__main__":
    main()
