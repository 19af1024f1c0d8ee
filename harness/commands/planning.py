"""The work of a plan by kind of stage: requested, shared, done and remaining stages, and an estimate of the time."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING

from harness.commands.opened import Opened
from harness.contracts.stage import kinds_in_order
from harness.core import fetched
from harness.core.counted import counted
from harness.executors.progress import format_seconds
from harness.model.source import has_sd1_shape
from harness.plan import cost
from harness.store.layout import RECORD
from harness.suite import fetching

if TYPE_CHECKING:
    from rich.console import Console

def show(opened: Opened, console: Console, tflops: float | None = None) -> None:
    """Print the stages by kind: requested, shared, done, and the remaining work in passes and time.

    `tflops` is the sustained throughput of a GPU; without it, and without records, a default is assumed.
    """
    from rich.table import Table

    plan, committed = opened.plan, opened.committed()
    rates = _rates(opened)
    trials = counted(len(plan.measurements), "trial")
    table = Table(title=f"{plan.suite} on {opened.source.name}: {trials}", title_justify="left")
    for header in ("stage", "in the grid", "after sharing", "done", "to do", "UNet passes to do", "estimate"):
        table.add_column(header, justify="left" if header == "stage" else "right")
    total_seconds, is_known = 0.0, True
    asked = cost.asked(plan)
    for kind in kinds_in_order():
        stages = {k: s for k, s in plan.stages.items() if s.kind == kind}
        if not stages:
            continue
        to_do = {k: s for k, s in stages.items() if k not in committed}
        work = sum(s.work for s in to_do.values())
        seconds = _estimate(kind, to_do, rates)
        is_known &= seconds is not None
        total_seconds += seconds or 0.0
        table.add_row(
            kind, str(asked[kind]), str(len(stages)), str(len(stages) - len(to_do)), str(len(to_do)), f"{work:,.0f}",
            format_seconds(seconds) if seconds is not None else "unknown",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"sharing saves {sum(asked.values()) - len(plan.stages)} of {counted(sum(asked.values()), 'stage')}",
        highlight=False,
    )
    shared, unshared = cost.shared_passes(plan), cost.unshared_passes(plan)
    ratio = f" ({unshared / shared:.1f} times as many)" if shared else ""
    apart = (
        f"; {unshared:,.0f}{ratio} if each attack on each concept erased, immunized, adapted and sampled for itself"
        if any(measurement.is_apart for measurement in plan.measurements)
        else ""
    )
    console.print(
        f"UNet passes (a backward pass counts as two): {shared:,.0f} with sharing{apart}", highlight=False
    )
    for line in fetched.lines(fetching.of_suite(opened.loaded)):
        console.print(line, highlight=False)
    if is_known:
        console.print(
            f"estimate: {format_seconds(total_seconds)} of stage time, from stages done here; divide by the number "
            "of workers",
            highlight=False,
        )
    else:
        console.print(
            "no estimate yet: learned from finished stages",
            highlight=False,
        )
    if tflops is not None or not is_known:
        to_do = sum(stage.work for key, stage in plan.stages.items() if key not in committed)
        _show_gpu_hours(opened, to_do, tflops, console)


def _show_gpu_hours(opened: Opened, passes: float, tflops: float | None, console) -> None:
    """Print GPU-hours from the operations of a pass and a throughput, with the source of both."""
    if not has_sd1_shape(opened.source):
        if tflops is not None:
            console.print("GPU-hours: unknown for this model; counted for the shape of SD 1.x alone", highlight=False)
        return
    basis = f"{tflops:g} TFLOP/s, as given" if tflops is not None else ""
    if tflops is None:
        tflops, assumed = cost.SUSTAINED[opened.loaded.suite.model.precision]
        basis = f"{tflops:g} TFLOP/s, an assumption: {assumed}; give what yours sustains with --tflops"
    console.print(
        f"GPU-hours to do: about {cost.gpu_hours(passes, tflops):,.1f} = {passes:,.0f} passes x "
        f"{cost.SD1_UNET_FLOPS / 1e12:.3f} TFLOP (SD 1.x UNet, 64 x 64 latents) / {basis}. Text encoder, VAE and "
        "metrics are not in it",
        highlight=False,
    )


def _rates(opened: Opened, limit: int = 40) -> dict[str, tuple[float, float]]:
    """Return kind -> (seconds per pass, seconds per stage), medians over records in the store for this model."""
    rates = {}
    for kind in {s.kind for s in opened.plan.stages.values()}:
        per_pass, per_stage = [], []
        for key in sorted(opened.store.committed(kind))[:limit]:
            path = opened.store.path(kind, key) / RECORD
            if not path.exists():
                continue
            record = json.loads(path.read_text("utf-8"))
            if record["identity"]["model"] not in ({}, dict(opened.source.identity)):
                continue
            per_stage.append(record["seconds"])
            if record["work"] > 0:
                per_pass.append(record["seconds"] / record["work"])
        if per_stage:
            rates[kind] = (statistics.median(per_pass) if per_pass else 0.0, statistics.median(per_stage))
    return rates


def _estimate(kind: str, to_do: dict, rates: dict[str, tuple[float, float]]) -> float | None:
    """Return the seconds that the remaining stages need; None if no stage of this kind was done here before."""
    if not to_do:
        return 0.0
    if kind not in rates:
        return None
    per_pass, per_stage = rates[kind]
    return sum(per_pass * s.work if s.work > 0 and per_pass > 0 else per_stage for s in to_do.values())
