"""Run an opened suite: an executor does the missing stages, then the tables are written and shown."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.commands import arguments
from harness.commands.opened import Opened
from harness.commands.pushing import push_at_end, push_left
from harness.commands.written import are_written, finish, write_resolved, write_tables
from harness.contracts.stage import kinds_in_order
from harness.core import disk, streams, termination
from harness.core.counted import counted
from harness.core.errors import ExitCode, UserMistake, one_line
from harness.executors import joining
from harness.executors.events import EventLog, with_notices
from harness.executors.walk import Summary, Walk
from harness.stages import code, heartbeat, tracking
from harness.stages.workplace import Workplace
from harness.store.store import WORK_DAYS
from harness.suite import fetching, locked
from harness.suite.preflight import preflight

if TYPE_CHECKING:
    from rich.console import Console

@dataclass(frozen=True)
class RunOptions:
    """How a suite is run; these options do not affect the results."""

    executor: str = "ray"  # one of EXECUTORS of `commands.run`
    cache: str = "only-missing"  # one of CACHE_MODES of `commands.run`
    is_tracked: bool = False  # write training curves for TensorBoard
    ray_address: str | None = None  # join this cluster; None: a private Ray on loopback


def run(opened: Opened, options: RunOptions, console: Console) -> ExitCode:
    """Run the missing stages and show the tables."""
    _check_options(options)
    arguments.note(opened.loaded.notices)
    committed = opened.committed()
    recorded_failures = {p.stem.partition("-")[2]: p for p in (opened.folder / "failures").glob("*.json")}
    if options.cache == "only-cached":
        opened.make_folder(for_tables=True)
        finish(opened, console)
        write_resolved(opened)
        return ExitCode.DONE
    other = opened.made_by_other_code(committed)
    redo = _redone(opened, options, committed, other)
    done = committed - redo
    push_left(opened, done, console)
    walk = Walk(opened.plan, done.__contains__)
    if options.cache == "always":
        _fail_as_before(walk, recorded_failures)
    if walk.is_finished:
        if walk.failed:
            finish(opened, console)
            return _show_failures(opened, walk.summary(), console)
        if not are_written(opened):
            opened.make_folder(for_tables=True)
            write_tables(opened)
            write_resolved(opened)
        show_other_code(opened, other, console)
        console.print(
            f"nothing to do: all {len(opened.plan.stages)} stages of '{opened.plan.suite}' are committed; "
            f"the tables are in {opened.folder}",
            highlight=False,
            soft_wrap=True,
        )
        return ExitCode.DONE
    _require(opened, options)
    show_other_code(opened, sorted(set(other) - redo), console)
    opened.make_folder()
    opened.store.sweep()
    if dropped := opened.store.sweep_work():
        console.print(
            f"removed the saved state of {counted(dropped, 'unfinished stage')}, untouched for {WORK_DAYS} days",
            highlight=False,
        )
    write_resolved(opened)
    with fetching.offline_if_fetched(opened.loaded, opened.folder / locked.NAME):
        return _walked(opened, options, walk, redo, console)


def _check_options(options: RunOptions) -> None:
    """Raise UserMistake for a cluster that the executor does not use, or whose address is none."""
    if options.ray_address is None:
        return
    if options.executor != "ray":
        raise UserMistake(
            f"--ray-address: --executor {options.executor} uses this process alone; leave one of the two out"
        )
    joining.parsed(options.ray_address)


def _redone(
    opened: Opened, options: RunOptions, committed: Collection[str], other: Collection[str]
) -> frozenset[str]:
    """Return the keys of committed stages that are done anew."""
    if options.cache == "never":
        return frozenset(committed)
    if options.cache == "stale=redo":
        return code.with_dependents(opened.plan.stages, other) & frozenset(committed)
    return frozenset()


def show_other_code(opened: Opened, keys: Collection[str], console: Console) -> None:
    """Say in one line which committed stages were made by other code than the code that is here."""
    if keys:
        kinds = Counter(opened.plan.stages[key].kind for key in keys)
        what = ", ".join(f"{kinds[kind]} {kind}" for kind in kinds_in_order() if kinds[kind])
        example = opened.plan.stages[min(keys)].title
        console.print(
            f"made by other code than the code here: {counted(len(keys), 'stage')} ({what}; for example "
            f"'{example}'); --cache stale=redo makes them anew",
            style="yellow", highlight=False, markup=False,
        )  # fmt: skip


def _require(opened: Opened, options: RunOptions) -> None:
    """Raise UserMistake, before any compute, for everything that the run needs and this machine lacks."""
    mistakes: list[str] = []
    for check, argument in (
        (fetching.require_installed, opened.loaded), (fetching.require_offline, opened.loaded),
        (preflight, opened.source), (_require_store, opened),
        *([(_check_devices, opened)] if options.ray_address is None else []),
    ):  # fmt: skip
        try:
            check(argument)
        except UserMistake as mistake:
            mistakes += mistake.messages
    if mistakes:
        raise UserMistake(mistakes)
    if options.is_tracked:
        tracking.require()


def _require_store(opened: Opened) -> None:
    """Raise UserMistake if the objects of the store cannot be written, listed and read."""
    if opened.store.url is not None:
        opened.store.objects.require_usable()


def _walked(
    opened: Opened, options: RunOptions, walk: Walk, redo: frozenset[str], console: Console
) -> ExitCode:
    """Run the plan by the executor and show the progress, then the tables."""
    from harness.executors.progress import Progress, format_seconds

    workplace = _workplace(opened, options, redo)
    events = EventLog(opened.folder / "events.jsonl")
    console.print(
        f"{opened.plan.suite}: {counted(walk.total, 'unit')} to do, {len(walk.cached)} done before; "
        f"results in {opened.folder}",
        highlight=False,
        soft_wrap=True,  # a path in a pipe stays whole
    )
    started = time.monotonic()
    heartbeat.sweep(opened.folder)
    with (
        termination.as_interrupt(),
        heartbeat.of_run(opened.folder, opened.plan.suite),
        Progress(walk, console) as progress,
    ):

        def listen(event: str, data: dict[str, Any]) -> None:
            try:
                events(event, data)
                progress(event, data)
            except BrokenPipeError:  # the reader of our output has ended, as `head` does: so do we
                streams.silence()
                raise KeyboardInterrupt from None
            except OSError as error:
                if not disk.is_full(error):
                    raise
                walk.stop(str(error))

        with with_notices(opened.folder, listen):
            if options.executor == "ray":
                from harness.executors import ray_tune

                summary = ray_tune.run(
                    walk,
                    workplace,
                    listen,
                    address=options.ray_address,
                    last_words=lambda summary: _show_lost(opened, walk, summary, console),
                )
            else:
                from harness.executors import serial

                summary = serial.run(walk, workplace, listen)
    with disk.tolerated():
        events("run_ended", {"done": summary.done, "failed": len(summary.failed), "blocked": len(summary.blocked)})
    if summary.stopped and not summary.is_interrupted:
        return _show_stopped(opened, walk, summary, console)
    if summary.lost:
        return _show_lost(opened, walk, summary, console)
    if summary.is_interrupted:
        write_tables(opened)
        console.print(
            f"interrupted after {summary.done} of {counted(walk.total, 'unit')}; everything finished is kept. "
            "Continue with the same command.",
            highlight=False,
        )
        return ExitCode.INTERRUPTED
    is_pushed = push_at_end(opened, console)
    finish(opened, console)
    console.print(f"{counted(summary.done, 'unit')} in {format_seconds(time.monotonic() - started)}", highlight=False)
    if summary.failed:
        return _show_failures(opened, summary, console)
    return ExitCode.DONE if is_pushed else ExitCode.TRIALS_FAILED


def _workplace(opened: Opened, options: RunOptions, redo: frozenset[str]) -> Workplace:
    resources = opened.loaded.suite.resources
    return Workplace(
        store=opened.store.root.resolve(),
        run_folder=opened.folder.resolve(),
        source=opened.source,
        plugins=opened.plugins,
        cpus=resources.cpus,
        gpus=resources.gpus,
        redo=redo,
        executor=options.executor,
        is_tracked=options.is_tracked,
        sharding=resources.sharding(),
        keep_checkpoint_mb=resources.keep_checkpoint_mb,
        stage_timeout_s=resources.stage_timeout_s,
        store_url=opened.store.url,
        is_apart=opened.store.url is not None and options.ray_address is not None,
    )


def _check_devices(opened: Opened) -> None:
    """Raise UserMistake, before any compute, if the suite requires a GPU that this machine does not have."""
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
    """Mark units whose stages failed in an earlier run as failed, without another try (--cache always)."""
    for index in sorted(walk.missing):
        broken = [recorded[k] for k in walk.unit(index).stages if k in recorded]
        if broken and index not in walk.blocked:
            walk.fail(index, json.loads(broken[0].read_text("utf-8"))["error"])
    walk.ready = type(walk.ready)(i for i in walk.ready if i not in walk.failed and i not in walk.blocked)


def _show_stopped(opened: Opened, walk: Walk, summary: Summary, console: Console) -> ExitCode:
    """Say that a full disk ended the run. The tables are not written: they would not fit either."""
    console.print(
        f"stopped, a disk is full: {one_line(summary.stopped, 300)}. {summary.done} of {counted(walk.total, 'unit')} "
        f"are done and kept in {opened.store.root}; free some space, then continue with the same command.",
        style="red",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return ExitCode.DISK_FULL


def _show_lost(opened: Opened, walk: Walk, summary: Summary, console: Console) -> ExitCode:
    """Write the tables of what is there, and say what ended the run."""
    write_tables(opened)
    console.print(
        f"ended, since {summary.lost}: {summary.done} of {counted(walk.total, 'unit')} are done; everything finished "
        f"is kept, and its tables are in {opened.folder}. Start the cluster again, then continue with the same "
        "command.",
        style="red",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return ExitCode.TRIALS_FAILED


def _show_failures(opened: Opened, summary: Summary, console: Console) -> ExitCode:
    console.print(
        f"{counted(len(summary.failed), 'unit')} failed and {len(summary.blocked)} could not be done because of them; "
        f"see {opened.folder}/failures and logs. The same command tries them again.",
        style="red",
        highlight=False,
    )
    return ExitCode.TRIALS_FAILED
