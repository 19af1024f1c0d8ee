"""How far scores and SGR in bf16, fp16 or TF32 are from those in fp32, beside how far they vary between seeds.

    python -m tests.benchmarks.precision [--suite quickstart] [--seeds 3] [--gpus 1] [--runs DIR] [bf16 fp16 ...]

The suite is run once in each precision, with the same seeds, so batches and starting noise are the same and every
difference is due to rounding. Runs that are finished are not done again; a precision that was interrupted goes on. On a
GPU `fp32+tf32` may be asked for too; a CPU has no TF32.

A line is a defense under an attack at its last step, by a metric: the SGR in fp32 with its standard deviation over
seeds, and for each precision the mean difference (same seeds) and the root mean square over seeds. If the latter is
well below the standard deviation, the precision changes no conclusion that the seeds allow. The second table does the
same for the scores themselves, over all cells of the grid; the third has the costs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness import api
from harness.core.precision import has_tf32, kind_of
from harness.suite import loading

if TYPE_CHECKING:
    from pandas import DataFrame, Series

BASE = "fp32"
CELL = ["task", "defense", "attack", "attacker", "protected", "concept", "role", "step", "metric"]
GROUP = ["task", "defense", "attack", "metric"]


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("precisions", nargs="*", default=["bf16", "fp16"])
    parser.add_argument("--suite", default="quickstart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"))
    parser.add_argument("--set", nargs="*", default=[], dest="settings", help="further key=value of the suite")
    given = parser.parse_args()
    precisions = [BASE, *(p for p in dict.fromkeys(given.precisions) if p != BASE)]
    runs = {precision: _run(given, precision) for precision in precisions}
    scores = {precision: scores_of(run.rows) for precision, run in runs.items()}
    print(f"\n{given.suite}, {given.seeds} seeds, {'GPU' if given.gpus else 'CPU'}\n")
    _print(sgr_table({precision: sgr_of(each) for precision, each in scores.items()}))
    _print(score_table(scores))
    _print([["precision", "stage hours", "steps skipped", "gradients repeated", "smallest loss scale"]] + [
        [precision, *costs(run.folder.parent / "store")] for precision, run in runs.items()
    ])  # fmt: skip


def _run(given: argparse.Namespace, precision: str):
    """Return the finished run in a precision; each has a folder, so that `rows` of all can be read side by side."""
    settings = dict(setting.split("=", 1) for setting in given.settings)
    settings = {key: json.loads(value) for key, value in settings.items()}
    model = loading.load(loading.find(given.suite)).suite.model.model_dump(exclude_none=True)
    model |= {"precision": kind_of(precision), "tf32": has_tf32(precision)}
    settings |= {"seeds": given.seeds, "resources.gpus": given.gpus, "model": model}
    return api.run(given.suite, executor="serial", runs=given.runs / precision, **settings)


def scores_of(rows: DataFrame) -> Series:
    """Return the mean score of each cell and seed, over prompts."""
    return rows.groupby([*CELL, "seed"], observed=True)["value"].mean()


def sgr_of(scores: Series) -> Series:
    """Return the SGR by group and seed: the mean over targets at the last step, each against `none` in its seed.

    Of metrics of which more is closer; cells whose undefended score is not above 0 are left out.
    """
    table = scores.reset_index()
    table = table[(table["role"] == "target") & (table["attack"] != "")]
    table = table[table["step"] == table.groupby(GROUP, observed=True)["step"].transform("max")]
    keys = ["task", "attack", "attacker", "protected", "concept", "metric", "seed"]
    none = table[table["defense"] == "none"].set_index(keys)["value"]
    table = table[table["defense"] != "none"].join(none.rename("none"), on=keys)
    table = table[table["none"] > 0]
    table["sgr"] = (table["none"] - table["value"]) / table["none"]
    return table.groupby([*GROUP, "seed"], observed=True)["sgr"].mean()


def differences(one: Series, base: Series) -> Series:
    """Return the differences of two precisions where both have a value."""
    return (one - base).dropna()


def sgr_table(found: dict[str, Series]) -> list[list[str]]:
    """Return a line for each group: SGR in fp32, its deviation over seeds, and the differences of each precision."""
    base = found[BASE]
    others = [precision for precision in found if precision != BASE]
    lines = [[*GROUP, "SGR fp32", "sd of seeds", *(f"{p} {what}" for p in others for what in ("- fp32", "rms"))]]
    for group, own in base.groupby(GROUP, observed=True):
        line = [*map(str, group), f"{own.mean():.3f}", f"{own.std():.3f}"]
        for precision in others:
            apart = differences(found[precision], own)
            line += [f"{apart.mean():+.4f}", f"{(apart**2).mean() ** 0.5:.4f}"]
        lines.append(line)
    return lines


def score_table(found: dict[str, Series]) -> list[list[str]]:
    """Return a line for each metric: deviation of a cell's score over seeds, and differences of each precision."""
    base = found[BASE]
    spread = base.groupby(CELL, observed=True).var().groupby("metric", observed=True).mean() ** 0.5
    others = [precision for precision in found if precision != BASE]
    lines = [["metric", "sd of seeds", *(f"{p} {what}" for p in others for what in ("- fp32", "rms", "largest"))]]
    for metric in spread.index:
        line = [str(metric), f"{spread[metric]:.4f}"]
        for precision in others:
            apart = differences(found[precision], base).xs(metric, level="metric")
            line += [f"{apart.mean():+.4f}", f"{(apart**2).mean() ** 0.5:.4f}", f"{apart.abs().max():.4f}"]
        lines.append(line)
    return lines


def costs(store: Path) -> list[str]:
    """Return stage hours, and what the loss scale cost, over all records of a store."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in store.glob("*/*/record.json")]
    numbers = [record["ledger"]["numbers"] for record in records]
    scales = [each["loss_scale"] for each in numbers if "loss_scale" in each]
    counts = [sum(each.get(name, 0) for each in numbers) for name in ("skipped_steps", "repeated_gradients")]
    hours = sum(record["seconds"] for record in records) / 3600
    return [f"{hours:.2f}", *(f"{count:.0f}" for count in counts), f"{min(scales):g}" if scales else ""]


def _print(lines: Sequence[Sequence[str]]) -> None:
    """Print a table as Markdown."""
    head, *rest = lines
    for line in (head, ["---"] * len(head), *rest):
        print(f"| {' | '.join(line)} |")
    print()


if __name__ == "__main__":
    main()
