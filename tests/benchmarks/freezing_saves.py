"""What frozen tensors save an honest user: FreezeAsGuard's table 3 with random masks, a process a measurement.

    python -m tests.benchmarks.freezing_saves
    python -m tests.benchmarks.freezing_saves --device cuda --model PATH --batch-size 4

The attack `full_finetune` itself, on images of noise: seconds a step after the first two, and the peak of memory above
the loaded model (with the copy of the trained weights that the harness puts back afterwards). Leave the machine alone
meanwhile. Each share is the mean over the masks of as many seeds, of each the best of several repetitions.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RATIOS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.8)
IMAGES = 12
WARM_UP_STEPS = 2


def main() -> None:
    """Measure each ratio, mask and repetition, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="masks of a ratio")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions; the fastest and the smallest count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="testbed", help="or a folder that diffusers saved")
    parser.add_argument("--csv", type=Path, help="write the table there too, beside the paper's")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_measure(given, float(given.one[0]), int(given.one[1]))))
        return
    print(f"{given.device}, {given.model}, batch {given.batch_size}, {given.steps} steps, {given.seeds} masks a ratio")
    print("| frozen tensors | parameters | weights, MB | optimizer, MB | peak, MB | ratio | s / step | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    whole: dict[str, float] = {}
    lines: list[dict[str, float | str]] = []
    for ratio in RATIOS:
        of_masks = [_best(given, ratio, seed) for seed in range(given.seeds if ratio else 1)]
        found = {name: sum(of[name] for of in of_masks) / len(of_masks) for name in of_masks[0]}
        whole = whole or found
        lines.append(_line(ratio, found, whole))
        print(
            f"| {100 * ratio:.0f} % | {100 * found['frozen']:.1f} % | {found['weights'] / 1e6:,.1f} | "
            f"{found['optimizer'] / 1e6:,.1f} | {found['memory'] / 1e6:,.0f} | "
            f"{found['memory'] / whole['memory']:.2f} | {found['seconds']:.3f} | "
            f"{found['seconds'] / whole['seconds']:.2f} |",
            flush=True,
        )
    if given.csv:
        with open(given.csv, "w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, list(lines[0]))
            rows.writeheader()
            rows.writerows(lines)


def _line(ratio: float, found: dict[str, float], whole: dict[str, float]) -> dict[str, float | str]:
    """Return a row of the CSV: what is measured, and what the paper's table 3 prints at that ratio."""
    from harness.analysis.paper_rows import load

    setting = f"user's fine-tuning; rho {100 * ratio:.0f} %"
    printed = {row.metric: row.printed for row in load("freezeasguard") if row.setting == setting}
    return {
        "frozen_tensors": ratio,
        "frozen_parameters": found["frozen"],
        "trained_bytes": found["weights"],
        "optimizer_bytes": found["optimizer"],
        "peak_memory_bytes": found["memory"],
        "peak_memory_ratio": found["memory"] / whole["memory"],
        "seconds_per_step": found["seconds"],
        "time_ratio": found["seconds"] / whole["seconds"],
        "paper_gpu_memory_gb": printed.get("GPU memory", ""),
        "paper_seconds_per_batch": printed.get("time per batch", ""),
    }


def _best(given: argparse.Namespace, ratio: float, seed: int) -> dict[str, float]:
    """Return the least of every number over the repetitions."""
    command = [sys.executable, "-m", "tests.benchmarks.freezing_saves", "--one", str(ratio), str(seed)]
    for name in ("steps", "batch_size", "device", "model"):
        command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    found = []
    for _ in range(given.rounds):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: min(each[name] for each in found) for name in found[0]}


def _measure(given: argparse.Namespace, ratio: float, seed: int) -> dict[str, float]:
    import torch

    from attacks.full_finetune import FullFinetune
    from defenses.freezing.random_freeze import RandomFreeze
    from harness.contracts.attack import Budget
    from harness.contracts.protection import Protection
    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run
    from harness.model.source import resolve_model
    from harness.stages.workplace import peak_memory_bytes, reset_peak_memory
    from harness.suite.spec import ModelSpec
    from tests.benchmarks.bilevel import _resident_bytes

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device(given.device)
    is_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = DiffusionModel.load(resolve_model(ModelSpec(id=given.model), "benchmark", folder), device)
        total = sum(p.numel() for n, p in model.parameters().items() if n.startswith("unet."))
        protection = Protection()
        if ratio:
            defense = RandomFreeze(RandomFreeze.Parameters(ratio))
            protection = defense.protect(model, [], [], Run(seed, device, "fp32", folder))
        run = Run(0, device, "fp32", folder, checkpoint_interval_s=float("inf"))
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        reset_peak_memory()
        idle = torch.cuda.memory_allocated() if is_gpu else _resident_bytes()
        stops = (WARM_UP_STEPS, WARM_UP_STEPS + given.steps)
        attack = FullFinetune(FullFinetune.Parameters(learning_rate=1e-5))
        clock = []
        for _ in attack.adapt(model, _concept(model, folder), protection, Budget(stops, given.batch_size), run):
            if is_gpu:
                torch.cuda.synchronize()
            clock.append(time.perf_counter())
        numbers = run.ledger.numbers
        return {
            "frozen": 1 - numbers["trainable_parameters"] / total,
            "weights": numbers["trained_bytes"],
            "optimizer": numbers["optimizer_bytes"],
            "memory": peak_memory_bytes(device) - idle,
            "seconds": (clock[1] - clock[0]) / given.steps,
        }


def _concept(model, folder: Path):
    """Return a concept of images of noise."""
    import numpy as np
    from PIL import Image

    from harness.contracts.attack import AttackedConcept

    source = np.random.default_rng(0)
    size = (model.image_size, model.image_size, 3)
    files = tuple(folder / f"{index}.png" for index in range(IMAGES))
    for path in files:
        Image.fromarray(source.integers(0, 256, size, dtype=np.uint8)).save(path)
    return AttackedConcept("object", ("a picture of a purse",) * IMAGES, files, called="purse")


if __name__ == "__main__":
    main()
