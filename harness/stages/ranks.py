"""Run a stage in several processes: start them, watch them, and make sure that all end.

The processes run on this machine, each with RANK, LOCAL_RANK and WORLD_SIZE set here; they meet in a file and talk on
loopback. Under Ray the stage's worker reserves the cores and GPUs of all of them, so they need not be Ray workers. Each
process has a pipe to its parent and ends when the parent ends, for any reason. Where no node of a cluster has room for
all of them, the first process is here and each other one with its `rank_host`.

If one fails or dies, the others are ended at once; if one is silent (see `pulse`), after SILENT_S. An error of a method
becomes the stage's. A death is tried once more, from the last saved state.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.stage import to_json
from harness.core import rank_environment
from harness.core.counted import counted
from harness.stages import deaths, pulse
from harness.stages.rank_host import Order
from harness.stages.rank_processes import HereProcess, ThereProcess

if TYPE_CHECKING:
    from harness.core.identity import Stage
    from harness.stages.workplace import Workplace

RELEASED, OUTCOME = "released", "outcome.json"
RETRIES = 1
"""How often the processes are started again after one of them died (not after its method raised)."""
CAUSE_S = 5.0
"""Seconds to wait for the process that broke the connection of another one."""
BROKEN_CONNECTION = ("connection closed by peer", "connection reset", "gloo", "nccl", "disterror", "distbackenderror")

log = logging.getLogger("immunitybench")


class ProcessesDiverged(RuntimeError, FloatingPointError):
    """The training that the processes share diverged."""


def run(
    stage: Stage,
    workplace: Workplace,
    work_folder: Path,
    folder: Path,
    report: Callable[[int, int], None],
    begun: tuple[float, float],
) -> dict[str, Any]:
    """Do a stage in `workplace.sharding.workers` processes; fill `folder`; return their combined ledger.

    `begun`: `Run.started` and `Run.began`, since starting the processes is part of the stage's time.

    Raises RuntimeError with the error of the first process that failed, ProcessDied if one died twice.
    """
    for attempt in range(RETRIES + 1):
        shutil.rmtree(work_folder / RELEASED, ignore_errors=True)
        for old in (*work_folder.glob("rank*.json"), work_folder / OUTCOME):
            old.unlink(missing_ok=True)
        try:
            _attempt(stage, workplace, work_folder, report, begun)
            break
        except deaths.ProcessDied as died:
            if attempt == RETRIES:
                raise deaths.ProcessDied(f"{died}; it died {counted(attempt + 1, 'time')}") from None
            log.warning("%s; tried once more", died)
    for item in (work_folder / RELEASED).iterdir():
        shutil.move(item, folder / item.name)
    return json.loads((work_folder / OUTCOME).read_text(encoding="utf-8"))


def _attempt(
    stage: Stage,
    workplace: Workplace,
    work_folder: Path,
    report: Callable[[int, int], None],
    begun: tuple[float, float],
) -> None:
    workers = workplace.sharding.workers
    logs = [workplace.run_folder / "logs" / f"{work_folder.name}.process{rank}.log" for rank in range(workers)]
    processes: list[HereProcess | ThereProcess] = []
    job = pickle.dumps((to_json(stage), workplace, work_folder, begun))
    places = workplace.rank_hosts
    with tempfile.TemporaryDirectory(prefix="immunitybench-") as meeting:
        if places:
            group = rank_environment.on_several_nodes(workers, workplace.address)
        else:
            group = rank_environment.on_one_machine(workers, Path(meeting))
        try:
            for rank in range(workers):
                order = Order(rank, group, workplace.cpus, job, logs[rank])
                if rank and places:
                    processes.append(ThereProcess(order, places[rank - 1], report))
                else:
                    processes.append(HereProcess(order, rank, workplace.address if places else None, report))
            _wait(processes, work_folder, logs)
        finally:
            for process in processes:
                process.end()


def _wait(processes: Sequence[HereProcess | ThereProcess], work_folder: Path, logs: list[Path]) -> None:
    """Wait until all succeeded. Raises RuntimeError or ProcessDied as soon as one fails, dies, or is silent."""
    while True:
        codes = [process.code() for process in processes]
        if any(codes):
            raise _failure(processes, work_folder, logs)
        if all(code == 0 for code in codes):
            return
        for rank, process in enumerate(processes):
            if codes[rank] is None and process.is_silent():
                raise deaths.ProcessDied(
                    f"process {rank} was silent for {pulse.SILENT_S:g} s: no answer, and no use of its CPU (stopped?)"
                )
        time.sleep(0.05)


def _failure(processes: Sequence[HereProcess | ThereProcess], work_folder: Path, logs: list[Path]) -> RuntimeError:
    """Return what made the processes fail: an error of a method, else a death, else a broken connection."""
    deadline = time.monotonic() + CAUSE_S
    while True:
        broken = ""
        died: list[int] = []
        for rank, process in enumerate(processes):
            if not process.code():
                continue
            recorded = work_folder / f"rank{rank}.json"
            if not recorded.exists():
                died.append(rank)
                continue
            known = json.loads(recorded.read_text(encoding="utf-8"))
            error = f"process {rank}: {known['error']}"
            if not any(words in error.lower() for words in BROKEN_CONNECTION):
                return ProcessesDiverged(error) if known["diverged"] else RuntimeError(error)
            broken = broken or error
        if died:
            ending = deaths.in_words(deaths.end_of([logs[died[0]]]))
            return deaths.ProcessDied(f"process {died[0]} {processes[died[0]].cause()}; {ending}")
        if time.monotonic() > deadline:
            return RuntimeError(broken)
        time.sleep(0.05)
