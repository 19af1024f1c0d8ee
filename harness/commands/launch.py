"""What `run`, `plan` and `status` do with an opened suite."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.core import fetched
from harness.core.errors import ExitCode, UserMistake
from harness.core.files import write_text
from harness.core.identity import KINDS
from harness.executors.events import EventLog
from harness.executors.walk import Walk
from harness.model.source import has_sd1_shape, preflight
from harness.plan import cost
from harness.stages import tracking
from harness.stages.execution import failure_path
from harness.stages.workplace import Workplace
from harness.store.store import RECORD
from harness.suite import fetching


def run(opened, given, console) -> ExitCode:
    """Do what is missing and show the leaderboard."""
    committed = opened.committed()
    recorded_failures = {p.stem.partition("-")[2]: p for p in (opened.folder / "failures").glob("*.json")}
    if given.cache == "only-cached":
        opened.make_folder()
        _finish(opened, console)
        return ExitCode.DONE
    done = set() if given.cache == "never" else committed
    walk = Walk(opened.plan, done.__contains__)
    if given.cache == "always":
        _fail_as_before(walk, recorded_failures)
    if walk.is_finished:
        if walk.failed:
            _finish(opened, console)
            return _tell_failures(opened, walk.summary(), console, given)
        if not opened.has_tables():
            opened.make_folder()
            opened.write_tables()
            write_resolved(opened)
        console.print(
            f"nothing to do: all {len(opened.plan.stages)} stages of '{opened.plan.suite}' are committed; "
            f"the leaderboard is in {opened.folder}/leaderboard.csv",
            highlight=False,
        )
        return ExitCode.DONE
    fetching.require_installed(opened.loaded)
    fetching.require_offline(opened.loaded)
    preflight(opened.source)
    if given.track:
        tracking.require()
    if given.ray_address is None:
        _check_devices(opened)
    opened.make_folder()
    opened.store.sweep()
    write_resolved(opened)
    resources = opened.loaded.suite.resources
    workplace = Workplace(
        store=opened.store.root.resolve(),
        run_folder=opened.folder.resolve(),
        source=opened.source,
        plugins=opened.plugins,
        cpus=resources.cpus,
        gpus=resources.gpus,
        redo=frozenset(opened.plan.stages) & committed if given.cache == "never" else frozenset(),
        executor=given.executor,
        is_tracked=given.track,
        sharding=resources.sharding(),
        keep_checkpoint_mb=resources.keep_checkpoint_mb,
    )
    events = EventLog(opened.folder / "events.jsonl")
    console.print(
        f"{opened.plan.suite}: {walk.total} units to do, {len(walk.cached)} done before; results in {opened.folder}",
        highlight=False,
    )
    started = time.monotonic()
    from harness.executors.progress import Progress, format_seconds

    with Progress(walk, console) as progress:

        def listen(event: str, data: dict[str, Any]) -> None:
            events(event, data)
            progress(event, data)

        if given.executor == "ray":
            from harness.executors import ray_tune

            summary = ray_tune.run(walk, workplace, listen, address=given.ray_address)
        else:
            from harness.executors import serial

            summary = serial.run(walk, workplace, listen)
    events("run_ended", {"done": summary.done, "failed": len(summary.failed), "blocked": len(summary.blocked)})
    if summary.is_interrupted:
        opened.write_tables()
        console.print(
            f"interrupted after {summary.done} of {walk.total} units; everything finished is kept. "
            "Go on with the same command.",
            highlight=False,
        )
        return ExitCode.INTERRUPTED
    _finish(opened, console)
    console.print(f"{summary.done} units in {format_seconds(time.monotonic() - started)}", highlight=False)
    if summary.failed:
        return _tell_failures(opened, summary, console, given)
    return ExitCode.DONE


def _check_devices(opened) -> None:
    """Raise UserMistake when the suite asks for a GPU that this machine does not have, before any compute."""
    resources = opened.loaded.suite.resources
    wanted = resources.gpus * resources.workers
    if wanted <= 0:
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted > found:
        where = opened.loaded.source.where(("resources", "gpus"))
        raise UserMistake(
            f"{where}: resources.gpus: a stage wants {wanted:g} GPU, this machine has {found}; "
            "use --set resources.gpus=0 for the CPU"
        )


def _fail_as_before(walk: Walk, recorded: dict[str, Path]) -> None:
    """Mark units whose stages failed in an earlier run as failed, without trying again (--cache always)."""
    for index in sorted(walk.missing):
        broken = [recorded[k] for k in walk.unit(index).stages if k in recorded]
        if broken and index not in walk.blocked:
            walk.fail(index, json.loads(broken[0].read_text("utf-8"))["error"])
    walk.ready = type(walk.ready)(i for i in walk.ready if i not in walk.failed and i not in walk.blocked)


def _finish(opened, console) -> None:
    from harness.results import leaderboard

    lines = opened.write_tables()
    leaderboard.show(lines, console)
    console.print(
        f"written: {opened.folder}/leaderboard.md, leaderboard.csv and more",
        highlight=False,
    )


def _tell_failures(opened, summary, console, given) -> ExitCode:
    console.print(
        f"{len(summary.failed)} unit(s) failed and {len(summary.blocked)} could not be done because of them; "
        f"see {opened.folder}/failures and logs. The same command tries them again.",
        style="red",
        highlight=False,
    )
    return ExitCode.TRIALS_FAILED


def write_resolved(opened) -> None:
    """Keep the suite as it was resolved, defaults and overrides included."""
    import yaml

    described = opened.loaded.suite.model_dump(mode="json")
    text = f"# resolved from {Path(opened.loaded.source.name).name}, with defaults and overrides\n"
    write_text(opened.folder / "suite.resolved.yaml", text + yaml.safe_dump(described, sort_keys=False))


def show_plan(opened, console, tflops: float | None = None) -> None:
    """Print the stages by kind: asked for, shared, done, and what is left to do in passes and time.

    `tflops` is what a GPU sustains; without it an assumed one is used, where there are no records to learn from.
    """
    from rich.table import Table

    from harness.executors.progress import format_seconds

    plan, committed = opened.plan, opened.committed()
    rates = _rates(opened)
    table = Table(title=f"{plan.suite} on {opened.source.name}: {len(plan.trials)} trials", title_justify="left")
    for header in ("stage", "in the grid", "after sharing", "done", "to do", "UNet passes to do", "estimate"):
        table.add_column(header, justify="left" if header == "stage" else "right")
    total_seconds, is_known = 0.0, True
    upstream = _upstream(plan)
    asked = _asked(plan, upstream)
    for kind in KINDS:
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
        f"sharing saves {sum(asked.values()) - len(plan.stages)} of {sum(asked.values())} stages", highlight=False
    )
    shared, unshared = cost.shared_passes(plan), cost.unshared_passes(plan, upstream)
    ratio = f" ({unshared / shared:.1f} times as many)" if shared else ""
    console.print(
        f"UNet passes (a backward pass counts as two): {shared:,.0f} with sharing; {unshared:,.0f}{ratio} if each "
        "attack on each concept erased, immunized, adapted and sampled for itself",
        highlight=False,
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
            "estimate: unknown for some kinds until a first stage of them was done here (it is learnt from records)",
            highlight=False,
        )
    if tflops is not None or not is_known:
        to_do = sum(stage.work for key, stage in plan.stages.items() if key not in committed)
        _tell_gpu_hours(opened, to_do, tflops, console)


def _tell_gpu_hours(opened, passes: float, tflops: float | None, console) -> None:
    """Print GPU-hours from the operations of a pass and a throughput, and where both come from."""
    if not has_sd1_shape(opened.source):
        if tflops is not None:
            console.print("GPU-hours: unknown for this model; counted for the shape of SD 1.x alone", highlight=False)
        return
    basis = f"{tflops:g} TFLOP/s, as given" if tflops is not None else ""
    if tflops is None:
        tflops, assumed = cost.SUSTAINED[opened.loaded.suite.model.precision]
        basis = f"{tflops:g} TFLOP/s, an assumption: {assumed}; say what yours sustains with --tflops"
    console.print(
        f"GPU-hours to do: about {cost.gpu_hours(passes, tflops):,.1f} = {passes:,.0f} passes x "
        f"{cost.SD1_UNET_FLOPS / 1e12:.3f} TFLOP (SD 1.x UNet, 64 x 64 latents) / {basis}. Text encoder, VAE and "
        "metrics are not in it",
        highlight=False,
    )


def _upstream(plan) -> Callable[[str], frozenset[str]]:
    """Return a function from a key to itself and the keys of all that it needs."""
    closure: dict[str, frozenset[str]] = {}

    def upstream(key: str) -> frozenset[str]:
        if key not in closure:
            inputs = plan.stages[key].inputs.values()
            closure[key] = frozenset({key}).union(*(upstream(other) for other in inputs))
        return closure[key]

    return upstream


def _asked(plan, upstream: Callable[[str], frozenset[str]]) -> Counter:
    """Return how many stages of each kind the grid would do if nothing were shared."""
    kinds = {key: stage.kind for key, stage in plan.stages.items()}
    asked: Counter = Counter()
    for trial in plan.trials:
        needed = {trial.sample, *trial.scores.values()}
        for key in tuple(needed):
            needed.update(*(upstream(other) for other in plan.stages[key].inputs.values()))
        asked.update([kinds[key] for key in needed])
    return asked


def _rates(opened, limit: int = 40) -> dict[str, tuple[float, float]]:
    """Return kind -> (seconds a pass, seconds a stage), medians over records in the store for this model."""
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
    """Return the seconds that the stages to do need, or None when no such stage was done here before."""
    if not to_do:
        return 0.0
    if kind not in rates:
        return None
    per_pass, per_stage = rates[kind]
    return sum(per_pass * s.work if s.work > 0 and per_pass > 0 else per_stage for s in to_do.values())


def show_status(opened, console) -> ExitCode:
    """Print how many stages are committed and what failed; return what a run would have returned."""
    committed = opened.committed()
    plan = opened.plan
    kinds = Counter(s.kind for s in plan.stages.values())
    done = Counter(plan.stages[k].kind for k in committed)
    for kind in KINDS:
        if kinds[kind]:
            console.print(f"{kind:<9} {done[kind]:>6} of {kinds[kind]}", highlight=False)
    failures = [
        json.loads(path.read_text("utf-8"))
        for key, stage in plan.stages.items()
        if (path := failure_path(opened.folder, stage.kind, key)).exists() and key not in committed
    ]
    for failure in failures:
        console.print(f"failed: {failure['label']}: {failure['error']}", style="red", highlight=False, markup=False)
    if failures:
        return ExitCode.TRIALS_FAILED
    console.print("finished" if len(committed) == len(plan.stages) else "not finished; `run` goes on", highlight=False)
    return ExitCode.DONE
