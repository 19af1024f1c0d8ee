"""The work of a plan by kind of stage: requested, shared, done and remaining stages, and an estimate of the time."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from harness.commands.opened import Opened
from harness.contracts.stage import kinds_in_order
from harness.core.counted import counted
from harness.core.tuning import PROPOSAL
from harness.executors.progress import format_seconds
from harness.model.source import SD1_UNET, has_sd1_shape
from harness.plan import cost
from harness.suite import fetching

if TYPE_CHECKING:
    from rich.console import Console

    from harness.core.identity import Stage

MOST_RECORDS = 2000
"""Records of a kind that are read for an estimate."""


def show(opened: Opened, console: Console, tflops: float | None = None) -> None:
    """Print the stages by kind: requested, shared, done, and the remaining work in passes and time.

    `tflops` is the sustained throughput of a GPU; without it, and without records, a default is assumed.
    """
    from rich.table import Table

    plan, committed = opened.plan, opened.committed()
    pace = _pace(opened)
    trials = counted(len(plan.measurements), "trial")
    table = Table(title=f"{plan.suite} on {opened.source.name}: {trials}", title_justify="left")
    for header in ("stage", "in the grid", "after sharing", "done", "to do", "UNet passes to do", "estimate"):
        table.add_column(header, justify="left" if header == "stage" else "right")
    total_seconds, n_unknown = 0.0, 0
    shared, (unshared, asked) = cost.shared_passes(plan), cost.unshared(plan)
    counts = Counter(stage.kind for stage in plan.stages.values())
    remaining: dict[str, list[Stage]] = {kind: [] for kind in counts}
    for key, stage in plan.stages.items():
        if key not in committed:
            remaining[stage.kind].append(stage)
    for kind in (kind for kind in kinds_in_order() if counts[kind]):
        to_do = remaining[kind]
        work = sum(s.work for s in to_do)
        known = [seconds for s in to_do if (seconds := pace.seconds(s)) is not None]
        total_seconds += sum(known)
        n_unknown += len(to_do) - len(known)
        table.add_row(
            kind, str(asked[kind]), str(counts[kind]), str(counts[kind] - len(to_do)), str(len(to_do)), f"{work:,.0f}",
            _estimate(known, len(to_do)),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"sharing saves {sum(asked.values()) - len(plan.stages)} of {counted(sum(asked.values()), 'stage')}",
        highlight=False,
    )
    ratio = f" ({unshared / shared:.1f} times as many)" if shared else ""
    apart = (
        f"; {unshared:,.0f}{ratio} if each attack on each concept erased, immunized, adapted and sampled for itself"
        if any(measurement.is_apart for measurement in plan.measurements)
        else ""
    )
    console.print(
        f"UNet passes (a backward pass counts as two): {shared:,.0f} with sharing{apart}", highlight=False
    )
    if counts["choose"]:
        of_probes = sum(stage.work for stage in plan.stages.values() if PROPOSAL in stage.inputs)
        console.print(
            f"tuning: {of_probes:,.0f} of these passes are for {counted(counts['assess'], 'probe')}, which choose "
            f"{counted(counts['choose'], 'setting')}",
            highlight=False,
        )
    for line in fetching.missing(opened.loaded):
        console.print(line, highlight=False, soft_wrap=True)  # options in it are copied
    basis = "from stages done here of the same kind, method, model, device and about the same work"
    if total_seconds:
        less = f" without {counted(n_unknown, 'stage')} of which none was done here" if n_unknown else ""
        console.print(
            f"estimate: {format_seconds(total_seconds)} of stage time{less}, {basis}; divide by the number of workers",
            highlight=False,
        )
    elif n_unknown:
        console.print(f"no estimate yet: learned {basis}", highlight=False)
    if tflops is not None or n_unknown:
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
        tflops, assumed = cost.SUSTAINED[cost.hardware(opened.loaded.suite.model.computes_in)]
        basis = f"{tflops:g} TFLOP/s, an assumption: {assumed}; give what yours sustains with --tflops"
    side = opened.source.resolution // cost.SD1_PIXELS if opened.source.resolution else SD1_UNET["sample_size"]
    flops = cost.sd1_flops(side)
    console.print(
        f"GPU-hours to do: about {cost.gpu_hours(passes, tflops, flops):,.1f} = {passes:,.0f} passes x "
        f"{flops / 1e12:.3f} TFLOP (SD 1.x UNet, {side} x {side} latents) / {basis}. Text encoder, VAE and metrics are "
        "not in it",
        highlight=False,
    )


def _pace(opened: Opened) -> cost.Pace:
    """Return how long finished stages in this store took, for kinds of which something is to do."""
    pace = cost.Pace(on_gpu=opened.loaded.suite.resources.gpus > 0)
    for kind in {stage.kind for stage in opened.plan.stages.values()}:
        for key in sorted(opened.store.here(kind))[:MOST_RECORDS]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or of another program
                pace.learn(opened.store.record(kind, key))
    return pace


def _estimate(known: list[float], to_do: int) -> str:
    """Return the table's cell for stages of which some have a known time."""
    if not known and to_do:
        return "unknown"
    more = f" + {to_do - len(known)} unknown" if len(known) < to_do else ""
    return f"{format_seconds(sum(known))}{more}"
