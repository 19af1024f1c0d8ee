"""What `table` and `compare` take on a run of about 1,000,000 rows: seconds and memory of the whole process.

    python -m tests.benchmarks.table_scale             # some minutes, of which most go to writing the store
    python -m tests.benchmarks.table_scale --folder large --against ../before --repeats 3

The store is a synthetic one: committed score stages, a folder with a record and the scores each, for every trial of a
suite of 8 defenses, 6 attacks, 3 metrics, 5 seeds, 9 targets and 20 prompts; what they hold is drawn at random. `table`
and `compare` then run as anybody would run them, each in a process of its own. On a machine that does other work the
seconds of the processor (user) are the ones to go by. With `--against` another checkout does the same on the same
store, in turns with this one: keys of stages must be the same in both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.core.identity import Stage

ROOT = Path(__file__).resolve().parents[2]
DEFENSES, ATTACKS, STEPS, PROMPTS = 8, 6, (10, 40, 120, 400), 20
METRICS = ("clip_image", "self_supervised_image", "clip_text")


def write_suite(folder: Path, seeds: int, targets: int) -> Path:
    """Write a suite; return its path."""
    from tests.conftest import write_model

    write_model(folder / "model")
    names = [f"target{i}" for i in range(targets)] + ["innocent", "sky"]
    prompts = ", ".join(f"a &m in place {i}" for i in range(PROMPTS))
    concept = f"generate: {{}}, attack_captions: [a photo of a &m], evaluation_prompts: [{prompts}]"
    lines = ["name: large", "model: model", f"seeds: {seeds}", "concepts:"]
    lines += [f"  {name}: {{kind: object, label: {name}, {concept}}}" for name in names]
    lines += [
        "tasks:",
        f"  relearning: {{erase: uce, targets: [{', '.join(names[:targets])}], innocents: [innocent]}}",
        "defenses:",
        "  - none",
        *(f"  - {{method: imma, name: imma{i}, rounds: {i + 1}}}" for i in range(DEFENSES - 1)),
        "attacks:",
        *(f"  - {{method: lora, name: lora{i}, steps: {list(STEPS)}, rank: {i + 1}}}" for i in range(ATTACKS)),
        f"metrics: [{', '.join(METRICS)}]",
        "utility: [sky]",
    ]
    path = folder / "suite.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_store(suite_path: Path, root: Path) -> tuple[int, int]:
    """Commit every score stage of a suite with random values; return how many there are and how many rows they make."""
    from harness import plan, suite
    from tests.trials import trials

    made = plan.make(suite.load(suite_path, []))
    source = random.Random(0)
    about = {
        "direction": "higher", "unit": "cosine", "range": "-1..1", "backbone": "ViT-B-32-quickgelu/openai",
        "preprocessing": "the backbone's own", "library": "open_clip_torch 3.3.0",
    }  # fmt: skip
    rows, written = 0, {}
    for released in {trial.released for trial in trials(made)} - {""}:  # a defense that is not committed has no rows
        _commit(root / "immunize" / released, made.stages[released])
    for trial in trials(made):
        level = {"real": 0.9, "floor": 0.1}.get(trial.role, 0.4)
        for key in trial.scores.values():
            if key not in written:
                values = [
                    f'  {{\n   "prompt": {prompt},\n   "step": {step},\n   "value": {drawn!r}\n  }}'
                    for step in trial.steps
                    for prompt in range(PROMPTS)
                    for drawn in [source.gauss(level + 0.3 * (step > 0), 0.1)]
                ]
                text = f'{{\n "about": {json.dumps(about)},\n "values": [\n{",".join(values)}\n ]\n}}\n'
                _commit(root / "score" / key, made.stages[key], text)
                written[key] = len(values)
            rows += written[key]
    return len(written), rows


def _commit(folder: Path, stage: Stage, scores: str | None = None) -> None:
    """Make the folder of a stage, as `Store.writing` leaves it."""
    from harness.core.identity import describe
    from harness.stages import code
    from harness.store import contents

    folder.mkdir(parents=True)
    if scores is not None:
        (folder / "scores.json").write_text(scores)
    record = {"identity": describe(stage), "key": folder.name, "work": 0, "seconds": 1.5, "code": code.of_stage(stage)}
    (folder / "record.json").write_text(json.dumps(contents.sealed(folder, record)))


def measure(checkout: Path, *arguments: str) -> None:
    """Run the program of a checkout; print its seconds and the most memory that it held."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments], cwd=checkout, stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)  # of this process alone; getrusage has the greatest of all so far
    wall = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"{arguments[0]} failed in {checkout}")
    print(
        f"{checkout.name} {arguments[0]}: {wall:.1f} s wall, {used.ru_utime:.1f} s user, {used.ru_stime:.1f} s system, "
        f"{used.ru_maxrss / 1024:.0f} MB",
        flush=True,
    )


def main() -> None:
    """Print what both verbs take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--targets", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="keep the store here, and use it if it is there")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, to be measured too")
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    checkouts = [ROOT] if given.against is None else [given.against.resolve(), ROOT]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        suite = folder / "suite.yaml"
        if not suite.exists():
            folder.mkdir(parents=True, exist_ok=True)
            files, rows = write_store(write_suite(folder, given.seeds, given.targets), folder / "runs" / "store")
            print(f"{rows:,} rows in {files:,} score stages", flush=True)
        large = str(folder / "runs" / "large")
        for _ in range(given.repeats):
            for checkout in checkouts:
                measure(checkout, "table", str(suite), "--runs", str(folder / "runs"))
            for checkout in checkouts:
                measure(checkout, "compare", large, "--defense=imma1", "--baseline=imma0", "--baseline=none")


if __name__ == "__main__":
    main()
