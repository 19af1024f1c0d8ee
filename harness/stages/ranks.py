"""Run a stage in several processes: start them, watch them, and make sure that all end.

The processes run on this machine, each with RANK, LOCAL_RANK and WORLD_SIZE set here; they meet in a file and talk on
loopback. Under Ray the stage's worker reserves the cores and GPUs of all of them, so they need not be Ray workers. Each
process has a pipe to its parent and ends when the parent ends, for any reason.

If one fails or dies, the others are ended at once; if one is silent (see `pulse`), after SILENT_S. An error of a method
becomes the stage's. A death is tried once more, from the last saved state.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.stage import to_json
from harness.core import rank_environment
from harness.core.counted import counted
from harness.stages import deaths, pulse
from harness.stages.pulse import Pulse

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
    processes: list[subprocess.Popen] = []
    pulses: list[Pulse] = []
    oom_kills_before = deaths.oom_kills()
    with tempfile.TemporaryDirectory(prefix="immunitybench-") as group:
        environment = rank_environment.of_group(workers, workplace.cpus, Path(group))
        try:
            for rank in range(workers):
                with open(logs[rank], "w", encoding="utf-8") as output:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "harness.stages.rank"],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=output,
                    )
                processes.append(process)
                pulses.append(Pulse(process.pid))
                try:
                    pickle.dump((to_json(stage), workplace, work_folder, begun), process.stdin)
                    process.stdin.flush()
                except BrokenPipeError:
                    pass  # it died at once; `_wait` says how
                threading.Thread(target=_listen, args=(process.stdout, pulses[rank], report), daemon=True).start()
            _wait(processes, pulses, work_folder, logs, oom_kills_before)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
            for process in processes:
                process.wait()
                process.stdin.close()


def _listen(pipe, watched: Pulse, report: Callable[[int, int], None]) -> None:
    """Note the beats of a process, and report the progress that the first one prints."""
    with pipe:
        for line in pipe:
            watched.beat()
            try:
                done, total = map(int, line.split())
            except ValueError:
                continue
            report(done, total)


def _wait(
    processes: list[subprocess.Popen], pulses: list[Pulse], work_folder: Path, logs: list[Path], oom_kills_before: int
) -> None:
    """Wait until all succeeded. Raises RuntimeError or ProcessDied as soon as one fails, dies, or is silent."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            raise _failure(processes, work_folder, logs, oom_kills_before)
        if all(code == 0 for code in codes):
            return
        for rank, watched in enumerate(pulses):
            if codes[rank] is None and watched.is_silent():
                raise deaths.ProcessDied(
                    f"process {rank} was silent for {pulse.SILENT_S:g} s: no answer, and no use of its CPU (stopped?)"
                )
        time.sleep(0.05)


def _failure(
    processes: list[subprocess.Popen], work_folder: Path, logs: list[Path], oom_kills_before: int
) -> RuntimeError:
    """Return what made the processes fail: an error of a method, else a death, else a broken connection."""
    deadline = time.monotonic() + CAUSE_S
    while True:
        broken = ""
        died: dict[int, int] = {}
        for rank, process in enumerate(processes):
            code = process.poll()
            if not code:
                continue
            recorded = work_folder / f"rank{rank}.json"
            if not recorded.exists():
                died[rank] = code
                continue
            error = f"process {rank}: {json.loads(recorded.read_text(encoding='utf-8'))['error']}"
            if not any(words in error.lower() for words in BROKEN_CONNECTION):
                return RuntimeError(error)
            broken = broken or error
        if died:
            rank, code = next(iter(died.items()))
            ending = deaths.in_words(deaths.end_of([logs[rank]]))
            return deaths.ProcessDied(f"process {rank} {deaths.cause(code, oom_kills_before)}; {ending}")
        if time.monotonic() > deadline:
            return RuntimeError(broken)
        time.sleep(0.05)
