"""Run a stage in several processes: start them, watch them, and make sure that all end.

The processes run on this machine, each with RANK, LOCAL_RANK, WORLD_SIZE and a port on loopback set here. Under Ray the
stage's worker reserves the cores and GPUs of all of them, so they need not be Ray workers. Each process has a pipe to
its parent and ends when the parent ends, for any reason. If one fails, the others are ended, and its error becomes the
stage's.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.stage import to_json

if TYPE_CHECKING:
    from harness.core.identity import Stage
    from harness.stages.workplace import Workplace

RELEASED, OUTCOME = "released", "outcome.json"


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

    Raises RuntimeError with the error of the first process that failed.
    """
    workers = workplace.sharding.workers
    logs = [workplace.run_folder / "logs" / f"{work_folder.name}.process{rank}.log" for rank in range(workers)]
    shutil.rmtree(work_folder / RELEASED, ignore_errors=True)
    for old in (*work_folder.glob("rank*.json"), work_folder / OUTCOME):
        old.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo"),
        "OMP_NUM_THREADS": str(workplace.cpus),
        # DeepSpeed compiles its CPU communication and looks for ninja there
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
        ),
        "DS_SKIP_CUDA_CHECK": "1",
    }
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(workers):
            with open(logs[rank], "w", encoding="utf-8") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "harness.stages.rank"],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                        stderr=log,
                    )
                )
            pickle.dump((to_json(stage), workplace, work_folder, begun), processes[-1].stdin)
            processes[-1].stdin.flush()
        threading.Thread(target=_forward, args=(processes[0].stdout, report), daemon=True).start()
        _wait(processes, work_folder, logs)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()
            process.stdin.close()
            if process.stdout:
                process.stdout.close()
    for item in (work_folder / RELEASED).iterdir():
        shutil.move(item, folder / item.name)
    return json.loads((work_folder / OUTCOME).read_text(encoding="utf-8"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forward(pipe, report: Callable[[int, int], None]) -> None:
    """Report the progress that the first process prints."""
    for line in pipe:
        try:
            done, total = map(int, line.split())
        except ValueError:
            continue
        report(done, total)


def _wait(processes: list[subprocess.Popen], work_folder: Path, logs: list[Path]) -> None:
    """Wait until all succeeded; raise RuntimeError as soon as one fails."""
    running = dict(enumerate(processes))
    while running:
        for rank, process in list(running.items()):
            try:
                code = process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                continue
            del running[rank]
            if code != 0:
                raise RuntimeError(_error(rank, code, work_folder, logs[rank]))


def _error(rank: int, code: int, work_folder: Path, log: Path) -> str:
    """Return the error of a failed process, or the end of its output."""
    recorded = work_folder / f"rank{rank}.json"
    if recorded.exists():
        return f"process {rank}: {json.loads(recorded.read_text(encoding='utf-8'))['error']}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"process {rank} ended with code {code}: {lines[-1] if lines else 'it printed nothing'}"
