"""Do a stage and commit it; every executor calls this, in any process.

The same stage gives the same result under the same key.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harness.core import disk, registry
from harness.core.errors import StageFailure, one_line
from harness.core.files import write_json
from harness.core.identity import Stage, describe
from harness.model.run import Run
from harness.stages import checkpoints, code, deaths, heartbeat, notices, sharing, void
from harness.stages.tracking import tracker
from harness.stages.work import StageAtWork
from harness.stages.workplace import Workplace, computing_in, peak_memory_bytes, prepare_device
from harness.store import provenance, scores
from harness.store.object_words import StoreProblem
from harness.store.store import Store

log = logging.getLogger("immunitybench")

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""Words in the errors of allocators, of main memory and of GPUs."""


def execute(
    key: str,
    stage: Stage,
    workplace: Workplace,
    report: Callable[[int, int], None] = lambda done, total: None,
    started: Callable[[str], None] = lambda key: None,
) -> bool:
    """Do one stage and commit it; return whether there was something to do. `started` is called with its key before.

    Raises StageFailure after recording what went wrong in the run's failures folder, also when a method calls
    `sys.exit`, and InputsLost if a stage that it reads is damaged; that one is set aside. KeyboardInterrupt passes
    through.
    """
    store = workplace.open_store()
    redo = key in workplace.redo
    if not redo and store.has(stage.kind, key):
        if workplace.is_apart and store.is_here(stage.kind, key):  # an earlier run may have left it here alone
            with _store_asked(key, stage, workplace):
                store.push(stage.kind, key)
        return False
    with (
        _logged(log_path(workplace.run_folder, stage.kind, key)),
        store.locked_work_folder(stage.kind, key) as work_folder,
    ):
        if not redo and store.is_here(stage.kind, key):  # another process did it while this one waited for the lock
            return False
        with _store_asked(key, stage, workplace):
            sharing.bring_inputs(stage, workplace, store)
        started(key)
        try:
            with heartbeat.of_stage(workplace.run_folder, key, stage) as heart:

                def progressed(done: int, total: int) -> None:
                    heart.progress(done, total)
                    report(done, total)

                _execute_locked(key, stage, workplace, store, work_folder, progressed, redo)
            told = partial(notify, stage, workplace)
            sharing.push(stage.kind, key, workplace, store, told, replace=redo)
        except (Exception, SystemExit) as error:
            log.exception("stage failed: %s", stage.title)
            _forget_model()
            store.clean_failed(work_folder)
            where = traceback.format_exc()
            raise record_failure(
                workplace.run_folder, stage.kind, key, stage.title, in_words(error), traceback=where
            ) from error
    failure_path(workplace.run_folder, stage.kind, key).unlink(missing_ok=True)
    _forget_model(further_alone=True)
    return True


@contextlib.contextmanager
def _store_asked(key: str, stage: Stage, workplace: Workplace) -> Iterator[None]:
    """Record a store that cannot be used in the block as the stage's failure, and raise StageFailure."""
    try:
        yield
    except StoreProblem as problem:
        log.error("%s", problem)
        raise record_failure(workplace.run_folder, stage.kind, key, stage.title, str(problem)) from None


def in_words(error: BaseException) -> str:
    """Return an exception as one line, with what to try when memory ran out."""
    words = f"{type(error).__name__}: {one_line(error, 500)}"
    if isinstance(error, SystemExit):
        return f"SystemExit: the method ended the program with exit code {one_line(error.code or 0, 60)}"
    ran_out = isinstance(error, MemoryError) or any(known in words.lower() for known in OUT_OF_MEMORY)
    return f"{words}; {deaths.LESS_MEMORY}" if ran_out and deaths.LESS_MEMORY not in words else words


def record_failure(run_folder: Path, kind: str, key: str, label: str, error: str, **details: Any) -> StageFailure:
    """Record a stage's failure in the run's failures folder; return it as an exception. `details` are JSON values."""
    path = failure_path(run_folder, kind, key)
    described = {"key": key, "kind": kind, "label": label, "error": error, "time": time.time()}
    with disk.tolerated():  # the failure may be that the disk is full
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**described, **details})
    return StageFailure(f"{label}: {one_line(error, 1000)}")


def _forget_model(*, further_alone: bool = False) -> None:
    """Drop the cached models, since a method that raised may have changed them."""
    models = sys.modules.get("harness.model.pipeline")
    if models is not None:
        models.forget(further_alone=further_alone)


def execute_unit(
    stages: Mapping[str, Stage],
    workplace: Workplace,
    report: Callable[[int, int], None] = lambda done, total: None,
    started: Callable[[str], None] = lambda key: None,
    failed_before: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Do the stages of a unit in order, each committed separately; return how many had to be done.

    If a stage fails, or failed before (key -> message), the stages of the unit that do not need it still run. Raises
    StageFailure at the end if any failed, and InputsLost at once if a stage that one of them reads must be made anew.
    """
    store = workplace.open_store()
    workplace = replace(workplace, redo=workplace.redo | checkpoints.gone_but_needed(stages, store))
    done = 0
    failed = dict(failed_before)
    for key, stage in stages.items():
        if key in failed_before:
            continue
        if failed.keys() & {read.key for read in stage.inputs.values()}:
            failed[key] = ""
            continue
        try:
            done += execute(key, stage, workplace, report, started)
        except StageFailure as failure:
            failed[key] = str(failure)
            if disk.is_full(failure):
                break  # the others would train, and then fail when they save
        except OSError as error:  # at the log or the lock, before anything was done
            if not disk.is_full(error):
                raise
            raise StageFailure(f"{stage.title}: {type(error).__name__}: {one_line(error)}") from error
    checkpoints.thin(stages, store, workplace.keep_checkpoint_mb)
    for key in checkpoints.spared(stages, store):
        stage = stages[key]
        try:
            with _store_asked(key, stage, workplace):
                sharing.push_spare(stage.kind, key, workplace, store, partial(notify, stage, workplace))
        except StageFailure as failure:
            failed[key] = str(failure)
    if failed:
        raise StageFailure("; ".join(message for message in failed.values() if message))
    return done


def not_committed(stages: Mapping[str, Stage], workplace: Workplace) -> list[str]:
    """Return the keys of the stages that are not in the store, in order."""
    store = workplace.open_store()
    return [key for key, stage in stages.items() if not store.has(stage.kind, key)]


def failure_path(run_folder: Path, kind: str, key: str) -> Path:
    """Return the path for the record of a stage's failure; failures are never part of the store."""
    return run_folder / "failures" / f"{kind}-{key}.json"


def log_path(run_folder: Path, kind: str, key: str) -> Path:
    """Return the path of a stage's log."""
    return run_folder / "logs" / f"{kind}-{key}.log"


def _execute_locked(
    key: str, stage: Stage, workplace: Workplace, store: Store, work_folder: Path, report, redo: bool
) -> None:
    import torch

    made_by = code.of_stage(stage)  # before its modules are imported
    device = prepare_device(workplace)
    log.info("%s %s: %s", stage.kind, key, stage.title)
    started = time.time()
    clock = time.perf_counter()
    curves = workplace.run_folder / "tensorboard" / f"{stage.kind}-{key}" if workplace.is_tracked else None
    with tracker(curves) as track, store.writing(stage.kind, key, replace=redo) as (folder, record):
        run = Run(
            stage.seed,
            device,
            stage.precision,
            work_folder,
            report=report,
            track=track,
            checkpoint_interval_s=workplace.checkpoint_interval_s,
            code=made_by,
            notify=lambda text: notify(stage, workplace, text),
            started=started,
            began=clock,
        )
        ledger = _computed_or_void(StageAtWork(stage, workplace, store, run, folder))
        scores.require(folder)
        earlier = ledger["sittings"]
        seconds = time.perf_counter() - clock + sum(each["seconds"] for each in earlier)
        record.update(
            identity=describe(stage),
            key=key,
            label=stage.title,
            code=made_by,
            spare=registry.get("stage", stage.kind).spare,
            work=stage.work,
            seconds=round(seconds, 4),
            started=earlier[0]["started"] if earlier else started,
            finished=time.time(),
            ledger=ledger,
            provenance={
                **provenance.describe(),
                "executor": workplace.executor,
                "threads": workplace.cpus,
                "sharding": _spread(stage, workplace),
                "speed": _hastened(stage, workplace),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            },
        )
    log.info("done in %.1f s", seconds)


def _computed_or_void(work: StageAtWork) -> dict[str, Any]:
    """Fill the folder of a stage; return its ledger. It is void if a stage that it reads is, or if a probe diverged."""
    stage = work.stage
    why = None if registry.get("stage", stage.kind).reads_void else void.of_inputs(stage, work.store)
    if why is None:
        try:
            return _computed(work)
        except void.DIVERGED as error:
            if not void.is_of_probe(stage):
                raise
            log.exception("diverged: %s", stage.title)
            _forget_model()
            why = in_words(error)
            notify(stage, work.workplace, f"diverged, so this probe counts as the worst: {why}")
    void.write(work.folder, why)
    return work.run.ledger.as_json()


def _computed(work: StageAtWork) -> dict[str, Any]:
    """Fill the folder of a stage, in this process or in several; return its ledger."""
    stage, workplace, run = work.stage, work.workplace, work.run
    if _is_shared(stage, workplace):
        from harness.stages import ranks

        _forget_model()  # free memory for the models of the processes
        return ranks.run(stage, workplace, run.folder, work.folder, run.report, (run.started, run.began))
    run.sharding = replace(workplace.sharding, workers=1, offload="none")
    with computing_in(stage.precision, run.device, run.notify):
        registry.get("stage", stage.kind)(None).do(stage.parameters, work)
    run.ledger.peak_memory_bytes = peak_memory_bytes(run.device)
    return run.ledger.as_json()


def notify(stage: Stage, workplace: Workplace, text: str) -> None:
    """Write one line about a stage to its log, and leave it for the user."""
    log.warning("%s", text)
    with contextlib.suppress(OSError):  # the log has it
        notices.say(workplace.run_folder, f"{stage.title}: {text}")


def _is_shared(stage: Stage, workplace: Workplace) -> bool:
    """Return whether several processes share the stage: it trains, by a method that can be spread."""
    sharding = workplace.sharding
    if not sharding.needs_deepspeed or stage.workers != sharding.workers:
        return False
    return registry.get("stage", stage.kind).can_spread(stage)


def _spread(stage: Stage, workplace: Workplace) -> dict[str, Any]:
    """Return how several processes shared a stage, and on which other nodes they were; {} for one process."""
    if not _is_shared(stage, workplace):
        return {}
    nodes = sorted({place.node for place in workplace.rank_hosts})
    return {**asdict(workplace.sharding), **({"other_nodes": nodes} if nodes else {})}


def _hastened(stage: Stage, workplace: Workplace) -> dict[str, bool]:
    """Return the settings that change how fast the diffusion model is, and how it rounds."""
    chosen, compiles = workplace.sharding, registry.get("stage", stage.kind).compiles
    return {"channels_last": chosen.channels_last, "compile": chosen.compile and compiles}


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send logging, stdout and stderr of the block to a file for this stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        level, propagate = log.level, root.level
        root.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            root.removeHandler(handler)
            log.setLevel(level)
            root.setLevel(propagate)
